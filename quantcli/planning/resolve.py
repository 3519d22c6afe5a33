"""From a recipe and a checkpoint's headers to a plan: one decision per tensor, before any weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import gcd
from typing import Any

from quantcli import algorithms, formats
from quantcli.algorithms import default_rounding
from quantcli.checkpoint.roles import LAYER_ROLES, classify, module_of, original_dtype
from quantcli.core.dtypes import DTYPE_OF_NUMBER
from quantcli.core.scheme import FALLBACK_GROUP_SIZES, Scheme
from quantcli.core.tensors import TensorInfo
from quantcli.errors import InputError, UsageError
from quantcli.formats.base import Storage
from quantcli.planning.adapters import refuse_adapter
from quantcli.planning.plan import LayerPlan, Loader, Plan
from quantcli.planning.recipe import Recipe, Rule, SchemeSpec, build_scheme
from quantcli.planning.requantization import refuse_quantized
from quantcli.planning.rules import SKIPPED, Fate, Rules, label_of, no_groups, require_support, scheme_asked_for
from quantcli.planning.steps import chain
from quantcli.system.text import listed, suggestion

_LEFT_BECAUSE = {
    "norm": "norm: tiny, and sensitive",
    "bias": "bias: tiny, and sensitive",
    "buffer": "not floating point",
    "parameter": "not the weight of a layer",
    "empty": "empty",
    "head": "output head: runtimes and accuracy want it unquantized",
    "tied head": "output head, tied to the embedding",
    "draft": "projection of multi-token prediction: runtimes want it unquantized, as they do the output head",
    "router": "router: decides which expert runs",
}

#: Why a tensor is not cast that has the dtype it would be cast to.
ALREADY = "already so"
#: What is said of nf4 where integers of four bits are refused.
_NF4_FROM_DATA = "whose codes are chosen without data, or from data with --algorithm gptq or awq"


def resolve(
    recipe: Recipe,
    infos: Sequence[TensorInfo],
    config: Mapping[str, Any] | None,
    *,
    data: bool | None = False,
    leave: Mapping[str, str] | None = None,
    loader: Loader | None = None,
) -> Plan:
    """Decide every tensor's fate; ``data`` says whether there is any to calibrate on (None: where it is needed).

    ``leave`` gives reasons, by name, for tensors that are not to be quantized whatever the recipe says; ``loader`` is
    what is known of the library that loads the result.

    Raises:
        UsageError: scheme, algorithm and format do not go together, a rule matches nothing, or a group
            size that was asked for does not divide a layer.
        InputError: the checkpoint is quantized, or an adapter, or holds nothing the scheme applies to.
    """
    refuse_quantized(infos, config)
    refuse_adapter(infos)
    return _Resolver(recipe, scheme_asked_for(recipe), infos, config, data, leave or {}, loader or Loader()).plan()


class _Resolver:
    """Holds what the decisions share; `plan` makes them."""

    def __init__(
        self,
        recipe: Recipe,
        wish: str | SchemeSpec,
        infos: Sequence[TensorInfo],
        config: Mapping[str, Any] | None,
        data: bool | None,
        leave: Mapping[str, str],
        loader: Loader,
    ) -> None:
        self.recipe, self.infos, self.config, self.data, self.loader = recipe, infos, config, data, loader
        self.leave = {**loader.leave, **leave}
        self.roles = classify(infos, config)
        self.rules = Rules(recipe)
        self.format_name = recipe.format or default_format(build_scheme(wish))
        self.format = formats.output_format(self.format_name)
        self.scheme = scheme = self._scheme(wish)
        self.name = label_of(wish, scheme)
        self.steps = chain(recipe, scheme, data=data)
        self.bad_groups: dict[int, list[str]] = {}
        #: Whether layers are left since no size of a group divides their columns.
        self.indivisible = False
        self._check_combination(scheme)
        floats = [info for info in infos if info.is_float]
        self.has_decoded = any(info.decoded for info in floats)
        self.majority = original_dtype([info for info in floats if not info.decoded] or floats)
        self.rest_dtype = self._rest_dtype()

    def _scheme(self, wish: str | SchemeSpec) -> Scheme:
        """A scheme as it was asked for; of a preset, with such inputs and groups as the format has."""
        scheme, storage = build_scheme(wish), self._storage
        if not isinstance(wish, str):
            return scheme
        if scheme.inputs is not None and not storage.input_zero_points:
            scheme = replace(scheme, inputs=replace(scheme.inputs, symmetric=True))
        if storage.channel_group and scheme.weights.granularity.kind == "channel":
            scheme = scheme.with_groups_of(storage.channel_group)
        return scheme

    @property
    def _storage(self) -> Storage:
        storage: Storage = getattr(self.format, "STORAGE", Storage())
        return storage

    def _check_combination(self, scheme: Scheme) -> None:
        reason = self.format.supports(scheme)
        if reason:
            raise UsageError(f"The format cannot carry this scheme: {reason}.", self._fitting_format(scheme))
        for step in self.steps.all:
            require_support(step.name, scheme.weights)

    def _fitting_format(self, scheme: Scheme) -> str:
        fitting = [name for name in formats.FORMATS if formats.output_format(name).supports(scheme) is None]
        if not fitting and scheme.is_static:
            return "Use --format onnx."
        return f"Use --format {fitting[0]}." if fitting else "No format carries it."

    def _rest_dtype(self) -> str | None:
        """What leftovers are cast to; None: they stay as they are."""
        wish = self.recipe.rest
        if wish == "auto":
            # A cast takes every tensor itself; what it leaves was to be skipped.
            if self.scheme.weights.is_cast:
                return None
            wide = self.majority in ("F32", "F64")
            if not self.loader.runs_narrow:
                return None if wide else "F32"
            return "BF16" if wide else self.majority if self.has_decoded else None
        return None if wish == "keep" else DTYPE_OF_NUMBER[wish]

    def plan(self) -> Plan:
        """Decide every tensor, then check that the whole makes sense."""
        self.rules.require_matches((info.name for info in self.infos), self._nearest_module)
        rules = [self.rules.first(info.name) for info in self.infos]
        layers = tuple(self._decide(info, rule) for info, rule in zip(self.infos, rules, strict=True))
        for size, names in self.bad_groups.items():
            raise UsageError(
                f"The group size {size} does not divide the columns of {len(names)} layers: {listed(names)}.",
                hint="Leave --group-size out to take the largest that fits each layer, or --skip these layers.",
            )
        unobeyed = self.rules.require_obeyed(zip(rules, self._fates(layers), strict=True))
        if not any(layer.scheme for layer in layers):
            reasons = Counter(layer.reason for layer in layers if layer.role in LAYER_ROLES)
            why = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
            what = f"with {self.name} as {self.format_name}"
            nothing = f"Nothing in this model can be quantized {what}: {why or 'no layer has weights'}."
            raise InputError(nothing, self._other_schemes())
        dtype = self.rest_dtype or (self.majority if self.majority != "F64" else "F32")
        if self.scheme.weights.is_cast:
            dtype = DTYPE_OF_NUMBER[self.scheme.weights.dtype]
        schemes = {layer.scheme for layer in layers if layer.has_codes and layer.scheme}
        scale_dtype = dtype
        if schemes:
            form = formats.quantized_format(self.format_name)
            scale_dtype = form.STORAGE.scale_dtype or dtype
            reason = form.together(schemes)
            if reason:
                raise UsageError(f"One {self.format_name} model cannot hold these schemes: {reason}.")
        roundings = sorted({layer.algorithm for layer in layers if layer.algorithm})
        after = [step.name for step in self.steps.final]
        before = [step.name for step in self.steps.all if step.name not in (*roundings, *after)]
        algorithm = " + ".join([*before, " and ".join(roundings), *after])
        return Plan(
            layers,
            self.format_name,
            self.name,
            algorithm,
            dtype,
            self.recipe,
            self.steps,
            scale_dtype,
            (*unobeyed, *self._warnings(layers)),
            self.loader,
        )

    def _other_schemes(self) -> str | None:
        """What to try where no layer can have codes of this scheme; None where nothing is known to be better."""
        weights = Counter[str]()
        for info in self.infos:
            weights[self.roles[info.name]] += info.numel
        if 2 * weights["conv"] > sum(weights[role] for role in LAYER_ROLES):
            return "Convolutions are quantized in a graph: -o NAME.onnx, with --scheme int8-static and --data, or int8."
        if "conv1d" in weights and self.format_name != "bitsandbytes":
            return f"Use --scheme nf4, {_NF4_FROM_DATA}; in eight bits, -o NAME.onnx."
        if self.indivisible:
            return "--scheme int8 has one scale for a row, whatever its length."
        if not self.loader.takes_codes:
            return f"Use --scheme nf4, {_NF4_FROM_DATA}; or --target vllm if that is meant."
        if self.loader.unpacked and self.scheme.weights.dtype != "int8":
            nf4 = f"--scheme nf4, {_NF4_FROM_DATA}; or " if self.loader.fits_nf4 else ""
            return f"Use {nf4}--scheme int8, which is stored in codes that it reads."
        if self.loader.leave or self.loader.unpacked:
            others = " or ".join(name for name in ("int8", "nf4") if name != self.name)
            return f"Try another scheme, such as {others}, or --target vllm."
        return None

    def _nearest_module(self, glob: str) -> str:
        hint = suggestion(glob, dict.fromkeys(module_of(info.name) for info in self.infos))
        return hint if hint.startswith("Did") else "See: quantcli inspect MODEL --layers"

    def _fates(self, layers: Iterable[LayerPlan]) -> Iterator[Fate]:
        """What a rule that holds for a tensor does to it; what is stored once shares the fate of its twin."""
        by_name = {layer.info.name: layer for layer in layers}
        for layer in by_name.values():
            told = by_name.get(layer.info.shares or "", layer) if layer.dropped else layer
            reason = None if told.scheme or told.reason == ALREADY else told.reason
            yield Fate((layer.info.name,), reason, layer.role in LAYER_ROLES)

    def _decide(self, info: TensorInfo, rule: Rule | None) -> LayerPlan:
        role = self.roles[info.name]
        if info.shares and self._is_tied_as_loaded(info, role):
            return LayerPlan(info, role, info.dtype, reason=f"tied to {info.shares}: stored once", dropped=True)
        if rule and rule.skip:
            return self._leave(info, role, SKIPPED)
        if info.name in self.leave:
            return self._leave(info, role, self.leave[info.name])
        scheme, label = self.scheme, self.name
        if rule and rule.scheme:
            scheme = self._scheme(rule.scheme)
            label = label_of(rule.scheme, scheme)
        if scheme.weights.is_cast:
            return self._cast(info, role, scheme, label, rule)
        if role not in LAYER_ROLES:
            return self._leave(info, role, _LEFT_BECAUSE[role])
        asked = rule is not None and rule.scheme is not None
        if role == "tied head" or (role in ("head", "draft", "router") and not asked):
            return self._leave(info, role, _LEFT_BECAUSE[role])
        reason = self.format.carries(role)
        if reason:
            return self._leave(info, role, reason)
        return self._quantize(info, role, scheme, label, rule)

    def _is_tied_as_loaded(self, info: TensorInfo, role: str) -> bool:
        """Whether what loads the result ties a head, or a table of words, that a file holds in the memory of another.

        A file of torch says so of any two tensors of one memory; a configuration, or its class, need not.
        """
        if self.loader.name:
            return role in ("tied head", "embedding") and info.name not in self.loader.untied
        told = (self.config or {}).get("tie_word_embeddings")
        return role == "tied head" and bool(self.recipe.runtime[0] in (None, "transformers") if told is None else told)

    def _cast(self, info: TensorInfo, role: str, scheme: Scheme, label: str, rule: Rule | None) -> LayerPlan:
        if self.recipe.group_size and scheme == self.scheme:
            raise UsageError(f"--group-size does not apply to {self.name}, which has no scales.")
        target = DTYPE_OF_NUMBER[scheme.weights.dtype]
        if not info.is_float or not info.numel or info.dtype == target:
            why = ALREADY if info.dtype == target else _LEFT_BECAUSE["empty" if not info.numel else "buffer"]
            return LayerPlan(info, role, info.dtype, reason=why)
        if self._is_wide_vector(info):
            return LayerPlan(info, role, "F32", reason=f"{self.format_name} holds vectors in fp32")
        if self._is_kept_fp32(info) and not (rule and rule.scheme):
            return LayerPlan(info, role, info.dtype, reason="fp32 among 16-bit tensors: kept as its author chose")
        return LayerPlan(info, role, target, scheme, label, algorithm=None)

    def _is_kept_fp32(self, info: TensorInfo) -> bool:
        """Whether a wide tensor stays wide: all others are 16 bits, so someone meant it."""
        wide = info.dtype in ("F32", "F64") and not info.decoded
        return self.recipe.rest == "auto" and wide and self.majority in ("F16", "BF16")

    def _is_wide_vector(self, info: TensorInfo) -> bool:
        return self._storage.wide_vectors and info.is_float and len(info.shape) == 1

    def _leave(self, info: TensorInfo, role: str, reason: str) -> LayerPlan:
        dtype = info.dtype
        if self._is_wide_vector(info):
            dtype = "F32"
        elif self._storage.one_dtype and info.is_float and info.name.endswith("weight") and self.recipe.rest == "auto":
            # What stands beside the codes is loaded as it is stored, and multiplied by what these give.
            dtype = "F32" if info.name in self.loader.wide else self.rest_dtype or self.majority
        elif self.rest_dtype and info.is_float and info.numel and not self._needs_fp32(info, role):
            dtype = self.rest_dtype
        return LayerPlan(info, role, dtype, reason=reason)

    def _needs_fp32(self, info: TensorInfo, role: str) -> bool:
        """Whether `--rest auto` keeps a tensor: routers, and statistics or state-space parameters."""
        if self.recipe.rest != "auto":
            return False
        small_parameter = role == "parameter" and len(info.shape) <= 2
        return role == "router" or small_parameter or self._is_kept_fp32(info)

    def _quantize(self, info: TensorInfo, role: str, scheme: Scheme, label: str, rule: Rule | None) -> LayerPlan:
        plan = LayerPlan(info, role, info.dtype, scheme, label)
        columns = plan.matrix_shape[1]
        spelled_out = not isinstance(rule.scheme if rule and rule.scheme else self.recipe.scheme, str)
        wanted = self.rules.group_size(rule)
        note = None
        kind, default = scheme.weights.granularity.kind, scheme.weights.granularity.size
        if default is not None:
            size = wanted or default
            together = self._columns_of_experts if info.name in self._experts and not wanted else columns
            if columns % size or (together % size and self._fitting(scheme, together)):
                if wanted or (spelled_out and kind == "group"):
                    self.bad_groups.setdefault(size, []).append(module_of(info.name))
                    return self._leave(info, role, "group size does not divide")
                fitting = self._fitting(scheme, together) or self._fitting(scheme, columns)
                if not fitting:
                    self.indivisible = True
                    return self._leave(
                        info, role, f"no {kind} size of {', '.join(map(str, FALLBACK_GROUP_SIZES))} divides {columns}"
                    )
                size = fitting[0]
                note = f"{kind} {size}: {default} does not divide {columns if columns % default else 'all experts'}"
            scheme = scheme.with_group_size(size)
        elif wanted and not self.recipe.rules:
            raise no_groups(label, scheme)
        if info.name in self.loader.weights_only and scheme.inputs is not None:
            scheme, note = replace(scheme, inputs=None), "inputs as they are, since transformers joins experts"
        self._check_combination(scheme)
        if info.name in self.loader.unpacked:
            unpacked = replace(scheme, unpacked=True)
            reason = self.format.supports(unpacked)
            if reason:
                return self._leave(info, role, f"{self.loader.name} reads its weight, and packed codes have none")
            scheme = unpacked
        if scheme.is_static and self.data is False:
            raise UsageError(
                f"{label} needs calibration data.", "Name some with --data; nothing is fetched or made up."
            )
        form = formats.quantized_format(self.format_name)
        reason = form.fits(plan.matrix_shape, scheme)
        if reason:
            return self._leave(info, role, reason)
        if not (scheme.weights.symmetric or form.STORAGE.lowest_zero_point):
            scheme = replace(scheme, weights=replace(scheme.weights, raised=True))
        if form.STORAGE.coarse_scales and not scheme.weights.symmetric:
            scheme = replace(scheme, weights=replace(scheme.weights, coarse=True))
        algorithm = self._algorithm(scheme, rule.algorithm if rule else None)
        return replace(plan, scheme=scheme, algorithm=algorithm, note=note, by_rows=form.STORAGE.by_rows)

    def _fitting(self, scheme: Scheme, columns: int) -> list[int]:
        """Sizes of groups that divide so many columns, the largest first."""
        sizes = (size for size in FALLBACK_GROUP_SIZES if columns % size == 0)
        return [size for size in sizes if self.format.supports(scheme.with_group_size(size)) is None]

    @cached_property
    def _experts(self) -> dict[str, TensorInfo]:
        """Experts that are stored one by one, and the shared ones beside them, by name."""
        if "expert" not in self.roles.values():
            return {}
        matrices = (info for info in self.infos if self.roles[info.name] in ("expert", "linear"))
        return {info.name: info for info in matrices if "experts" in info.name}

    @cached_property
    def _columns_of_experts(self) -> int:
        """What divides the columns of all experts: runtimes unpack them with one size, be it that of a shared one."""
        return gcd(*(info.columns for info in self._experts.values()))

    def _algorithm(self, scheme: Scheme, wish: str | None) -> str:
        """What chooses a layer's codes."""
        if wish in (None, "auto"):
            return self.steps.rounding.name if self.steps.rounding else default_rounding(scheme.weights)
        require_support(wish, scheme.weights)
        if algorithms.algorithm(wish).NEEDS and wish not in [step.name for step in self.steps.all]:
            raise UsageError(f"A rule asks for {wish}, which the recipe's steps do not hold.", "Add it to them.")
        return wish

    def _warnings(self, layers: Iterable[LayerPlan]) -> tuple[str, ...]:
        warnings = []
        experts = [layer for layer in layers if layer.role in ("expert", "experts") and layer.scheme is None]
        if experts:
            share = sum(layer.info.nbytes for layer in experts) / max(1, sum(info.nbytes for info in self.infos))
            known = "" if experts[0].reason == SKIPPED else ", and --skip '*experts*' says that this is meant"
            warnings.append(
                f"{len(experts)} expert weights, {share:.0%} of the model, are left unquantized: "
                f"{experts[0].reason}{known}."
            )
        unpacked = sum(bool(layer.scheme and layer.scheme.unpacked) for layer in layers)
        if unpacked:
            warnings.append(
                f"{unpacked} layers are stored with unpacked codes, since {self.loader.name} reads their weights; vLLM "
                "and SGLang want packed ones (--target vllm)."
            )
        if self.recipe.rest == "auto" and not self.loader.runs_narrow:
            warnings.append(f"What is not quantized is float32: {self.loader.name} does not run in 16 bits here.")
        left = Counter(self.loader.leave.get(layer.info.name) for layer in layers if layer.role in LAYER_ROLES)
        warnings += [f"{count} weights are left: {reason}." for reason, count in left.most_common(4) if reason]
        sizes = Counter(layer.note for layer in layers if layer.note)
        warnings += [f"{count} layers use {note}." for note, count in sizes.most_common(3)]
        return tuple(warnings)


def default_format(scheme: Scheme) -> str:
    """The format for a scheme where none is asked for."""
    if scheme.weights.is_cast:
        return "safetensors"
    return "bitsandbytes" if scheme.weights.dtype == "nf4" else "compressed-tensors"
