"""The ways in which a checkpoint's layers can be stored, what each takes in the artifact, and recipes of mixes."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantcli.algorithms import RANGES, where_reproducible
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.hugging_face import neighbours
from quantcli.checkpoint.roles import LAYER_ROLES, classify, module_of
from quantcli.conversion.checkpoint.layout import Layout, plan_layout
from quantcli.core.manifest import MANIFEST, Manifest, ManifestLayer
from quantcli.core.scheme import PRESETS
from quantcli.errors import UsageError
from quantcli.planning.plan import LayerPlan, Loader, Plan
from quantcli.planning.recipe import Recipe
from quantcli.planning.resolve import resolve
from quantcli.planning.rules import Rules, full_label
from quantcli.planning.targets import for_target
from quantcli.planning.targets.fused import fused_layers
from quantcli.search.budget import FLOAT
from quantcli.search.choices import (
    SKIP,
    Choice,
    Group,
    Mix,
    Rule,
    chosen,
    chosen_recipe,
    rules_of,
    ways_to_store,
)
from quantcli.system.text import listed

#: Files that the conversion writes itself.
_WRITTEN = (MANIFEST, "config.json")
#: What the manifest says of verification, and notes on layers, in bytes at the most.
_VERIFIED_BYTES, _NOTE_BYTES = 1200, 40
#: What it says of calibration data, with hashes of its n-grams.
_SKETCH_BYTES = 512 * 8 * 4 // 3 + 1000
#: Roles of layers that are chosen for; routers and tied heads stay.
_CHOSEN = tuple(role for role in LAYER_ROLES if role not in ("router", "tied head", "draft"))
#: Which scheme is the others' is known in the end, so that heads stay as they are where that matters.
_WITH_PLAIN_HEADS = ("vllm", "sglang")


@dataclass(frozen=True)
class Way:
    """One scheme for all layers that take it, as it would be planned."""

    rule: Rule
    layers: Mapping[str, LayerPlan]
    nbytes: Mapping[str, int]


@dataclass
class Ways:
    """What can be chosen for a checkpoint.

    ``output`` is where the artifact goes, whose name decides whether it is a folder; ``allow`` are schemes;
    ``calibrated``: codes are fitted to data, of which the manifest holds a sketch.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    allow: Sequence[str]
    loader: Loader
    output: Path
    calibrated: bool = False

    def __post_init__(self) -> None:
        self.infos = self.checkpoint.infos()
        self._roles = classify(self.infos, self.checkpoint.config)
        self._casts = [name for name in self.allow if name == FLOAT or PRESETS[name].weights.is_cast]
        schemes = [name for name in self.allow if name not in self._casts]
        self._ways = [self._way(rule) for rule in ways_to_store(self.recipe, schemes).values()]
        if not self._ways:
            raise UsageError("--allow names no scheme with fewer bits than 16.", "Add int8 or int4.")
        self._require_one_where_fused()

    def planned(self, recipe: Recipe) -> Plan:
        """The plan of a recipe, data being there where it is needed. Raises UsageError where a target refuses it."""
        return for_target(resolve(recipe, self.infos, self.checkpoint.config, data=None, loader=self.loader))

    def _require_one_where_fused(self) -> None:
        """SGLang looks for exceptions from the model's scheme under a name that the files do not have."""
        ways = {self.label(way, name) for way in self._ways for name in way.layers}
        if self.recipe.runtime[0] == "sglang" and len(ways) > 1 and self._together:
            raise UsageError(
                f"SGLang makes one matrix of layers such as {next(iter(self._together))} and its neighbours, and takes "
                f"one scheme for all of these, so that a search may not choose from {listed(sorted(ways))}.",
                "Name one and what stays as it is, such as: --allow int4,bf16 --group-size 64",
            )

    def _way(self, stored: Rule) -> Way:
        # A head is quantized only where a rule asks for it; a size that does not fit a layer is none for it.
        rule, layers, nbytes = dict(stored), dict[str, LayerPlan](), dict[str, int]()
        size = rule.get("group_size", 1)
        fitting = [
            {"match": [_pattern(info.name)], **rule}
            for info in self.infos
            if (role := self._roles[info.name]) in _CHOSEN
            and not (info.rows if role == "conv1d" else info.columns) % size
        ]
        plan = self._resolved(rule["scheme"], fitting)
        layout = plan_layout(plan, self.checkpoint, self.output)
        for layer in plan.layers:
            if layer.has_codes:
                layers[layer.info.name] = layer
                nbytes[layer.info.name] = _nbytes(layout, layer.info.name)
        return Way(stored, layers, nbytes)

    def _resolved(self, scheme: str, rules: Sequence[Mapping[str, Any]]) -> Plan:
        recipe = chosen_recipe(self.recipe, {"scheme": scheme}, rules)
        return resolve(recipe, self.infos, self.checkpoint.config, data=None, loader=self.loader)

    @property
    def _chosen_roles(self) -> tuple[str, ...]:
        """Roles of layers that are chosen for. Serving runtimes take a head only in a scheme that no others have."""
        if self.recipe.runtime[0] in _WITH_PLAIN_HEADS:
            return tuple(role for role in _CHOSEN if role != "head")
        return _CHOSEN

    @cached_property
    def _free(self) -> dict[str, LayerPlan]:
        """What is chosen for, by name: a rule of the user's own decides nothing of it."""
        rules = Rules(self.recipe)
        return {
            name: layer
            for way in self._ways
            for name, layer in way.layers.items()
            if layer.role in self._chosen_roles
            and ((rule := rules.first(name)) is None or not (rule.scheme or rule.skip))
        }

    @cached_property
    def _together(self) -> dict[str, str]:
        """Layers that the runtime makes one of, each with that one's name."""
        found: dict[str, str] = {}
        if self.recipe.runtime[0] not in (None, "transformers"):
            for fused in fused_layers(self._free.values()):
                found |= {part.info.name: f"{fused.parent}.{fused.name}" for part in fused.parts}
        return found

    @cached_property
    def groups(self) -> list[tuple[str, ...]]:
        """Names of tensors that are chosen for, those together that a runtime stores alike."""
        found: dict[str, list[str]] = {}
        for info in self.infos:
            if info.name in self._free:
                # Every runtime unpacks the experts of a model alike.
                key = "experts" if "experts" in info.name else self._together.get(info.name, info.name)
                found.setdefault(key, []).append(info.name)
        return [tuple(names) for names in found.values()]

    @cached_property
    def left_bytes(self) -> dict[str, int]:
        """What tensors take that stay unquantized, as leftovers of a quantized model are stored."""
        found: dict[str, int] = {}
        # Two models, each with one group quantized: between them, all others are left once.
        for names in self.groups[:2]:
            way = next(way for way in self._ways if names[0] in way.layers)
            rules = [{"match": list(map(_pattern, names)), **dict(way.rule)}]
            rules += [{"match": _pattern(info.name), "skip": True} for info in self.infos if info.name not in names]
            layout = plan_layout(self._resolved(dict(way.rule)["scheme"], rules), self.checkpoint, self.output)
            found |= {info.name: _nbytes(layout, info.name) for info in self.infos if info.name not in names}
        return found

    def choices(self, costs: Mapping[str, Mapping[str, float]]) -> list[Group]:
        """The groups with their choices; ``costs`` are those of every tensor by the choice's label."""
        groups = []
        for names in self.groups:
            found: dict[str, Choice] = {}
            for way in self._ways:
                if not all(name in way.layers for name in names):
                    continue
                label = self.label(way, names[0])
                cost = sum(costs.get(name, {}).get(label, 0.0) for name in names)
                size = sum(way.nbytes[name] for name in names)
                found.setdefault(label, Choice(label, way.rule, size, cost))
            if self._casts and all(name in self.left_bytes for name in names):
                size = sum(self.left_bytes[name] for name in names)
                found[self._casts[0]] = Choice(self._casts[0], SKIP, size, 0.0)
            groups.append(Group(tuple(map(_pattern, names)), tuple(found.values())))
        return groups

    def is_head(self, name: str) -> bool:
        """Whether a tensor is an output head, which one scheme for all leaves as it is."""
        return self._roles[name] == "head"

    def layer_ways(self, name: str) -> dict[str, LayerPlan]:
        """A tensor's plans, by the label of the choice."""
        return {self.label(way, name): way.layers[name] for way in self._ways if name in way.layers}

    @staticmethod
    def label(way: Way, name: str) -> str:
        """What a choice is called."""
        layer = way.layers[name]
        return full_label(layer.label, layer.scheme) or ""

    def recipe_of(self, groups: Sequence[Group], mix: Mix) -> Recipe:
        """An ordinary recipe that stores the layers so."""
        uniform = self._uniform_rule(groups, mix)
        if uniform is not None:
            return chosen_recipe(self.recipe, dict(uniform))
        counts: dict[str, int] = {}
        rules = rules_of(groups, mix)
        for rule in rules:
            if "scheme" in rule:
                counts[rule["scheme"]] = counts.get(rule["scheme"], 0) + len(rule["match"])
        if counts:
            main = max(counts, key=lambda scheme: counts[scheme])
            return chosen_recipe(self.recipe, {"scheme": main}, rules)
        # All layers stay as they are, so that the model is cast.
        cast = "bf16" if self._casts[0] == FLOAT else self._casts[0]
        return chosen_recipe(self.recipe, {"scheme": cast, "algorithm": "auto", "steps": []})

    def _uniform_rule(self, groups: Sequence[Group], mix: Mix) -> Rule | None:
        """The one scheme of all layers but heads, which stay as they are without a rule; None where there are more."""
        rules = {
            choice.rule
            for names, choice in zip(self.groups, chosen(groups, mix), strict=True)
            if not (choice.rule == SKIP and all(map(self.is_head, names)))
        }
        heads = any(
            self.is_head(names[0]) and choice.rule != SKIP
            for names, choice in zip(self.groups, chosen(groups, mix), strict=True)
        )
        return None if len(rules) != 1 or heads or SKIP in rules else next(iter(rules))

    def artifact_bytes(self, recipe: Recipe) -> int:
        """Bytes of all files of the artifact, at the most. Raises UsageError where a target refuses the recipe."""
        plan = self.planned(recipe)
        layout = plan_layout(plan, self.checkpoint, self.output)
        folder = self.checkpoint.folder
        if folder is None:
            return layout.nbytes
        beside = neighbours(folder, self.checkpoint.files).copied
        copied = sum((folder / path).stat().st_size for path in beside if path.as_posix() not in _WRITTEN)
        config = json.dumps(layout.config(plan, self.checkpoint.config), indent=2, ensure_ascii=False)
        index = len(layout.shards) > 1 and sum(len(name) + 60 for name in layout.specs) + 200
        return (
            layout.nbytes
            + copied
            + len(config.encode())
            + 1
            + index
            + _manifest_bytes(plan, calibrated=self.calibrated)
        )


def _manifest_bytes(plan: Plan, *, calibrated: bool) -> int:
    """What the manifest will take, at the most."""
    layers = {
        layer.info.name: ManifestLayer(scheme=str(layer.scheme), algorithm=layer.algorithm, sqnr_db=-999.9999)
        if layer.scheme
        else ManifestLayer(dtype=layer.dtype, reason=layer.reason)
        for layer in plan.layers
    }
    algorithms = [step.name for step in plan.steps.all]
    manifest = Manifest(
        quantcli="0" * 16,
        input_sha256="0" * 64,
        format=plan.format,
        scheme=plan.scheme,
        algorithm=plan.algorithm,
        recipe=plan.recipe.model_dump(mode="json"),
        reproducible=where_reproducible([*algorithms, *(layer.algorithm or "" for layer in plan.layers), RANGES]),
        layers=layers,
    )
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False)
    # Experts are told how many tokens they saw.
    notes = sum(
        len(layer.note or "") + (_NOTE_BYTES if "expert" in layer.info.name else 0)
        for layer in plan.layers
        if layer.has_codes
    )
    return len(text.encode()) + notes + _VERIFIED_BYTES + calibrated * _SKETCH_BYTES


def _nbytes(layout: Layout, name: str) -> int:
    return sum(spec.nbytes for spec in layout.layer_specs[name].values())


def _pattern(name: str) -> str:
    """A glob that means a tensor alone, its biases aside: brackets in names are no sets of characters."""
    return glob.escape(module_of(name) if name.endswith(".weight") else name)
