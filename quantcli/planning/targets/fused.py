"""Layers of a plan that runtimes make one of: projections of one input, and the experts of a mixture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from quantcli.checkpoint.roles import module_of
from quantcli.core.scheme import Scheme
from quantcli.planning.plan import LayerPlan
from quantcli.system.text import listed

#: Layers that vLLM and SGLang make one matrix of, by the last part of their names, and the name of that matrix.
FUSED = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("query", "key", "value"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
    ("w1", "w3"): "gate_up_proj",
    ("in_proj_qkv", "in_proj_z"): "in_proj_qkvz",
    ("in_proj_b", "in_proj_a"): "in_proj_ba",
    ("q_a_proj", "kv_a_proj_with_mqa"): "fused_qkv_a_proj",
}


@dataclass(frozen=True)
class FusedLayers:
    """Layers of one parent that a runtime makes one matrix ``name`` of."""

    name: str
    parts: tuple[LayerPlan, ...]

    @property
    def parent(self) -> str:
        """The module that they belong to."""
        return module_of(module_of(self.parts[0].info.name))

    @property
    def schemes(self) -> set[Scheme | None]:
        """The schemes of the parts; None: one is left unquantized."""
        return {scheme_of(part) for part in self.parts}


def fused_layers(layers: Iterable[LayerPlan]) -> list[FusedLayers]:
    """Linear layers that a fusing runtime makes one of, where at least two of a kind are there."""
    parents: dict[str, dict[str, LayerPlan]] = {}
    for layer in layers:
        if layer.role in ("linear", "conv1d"):
            parents.setdefault(module_of(module_of(layer.info.name)), {})[leaf_of(layer)] = layer
    found = []
    for members in parents.values():
        for leaves, name in FUSED.items():
            parts = tuple(members[leaf] for leaf in leaves if leaf in members)
            found += [FusedLayers(name, parts)] if len(parts) > 1 else []
    return found


def mixtures(layers: Iterable[LayerPlan]) -> dict[str, list[LayerPlan]]:
    """Experts that are tensors of their own, by the mixture that they belong to."""
    found: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        if layer.role == "expert":
            found.setdefault(layer.info.name.split(".experts.")[0] + ".experts", []).append(layer)
    return found


def told_apart(layers: Iterable[LayerPlan]) -> str:
    """Schemes with the layers that have them: ``q_proj int4, group 128, but k_proj unquantized``."""
    layers = list(layers)
    alike = len({leaf_of(layer) for layer in layers}) < len({(leaf_of(layer), scheme_of(layer)) for layer in layers})
    by_scheme: dict[str, dict[str, None]] = {}
    for layer in layers:
        # Experts that are called alike are told apart by their number, which stands before.
        name = ".".join(module_of(layer.info.name).split(".")[-2 if alike else -1 :])
        scheme = scheme_of(layer)
        by_scheme.setdefault(str(scheme) if scheme else "unquantized", {})[name] = None
    return ", but ".join(f"{listed(list(names))} {scheme}" for scheme, names in by_scheme.items())


def scheme_of(layer: LayerPlan) -> Scheme | None:
    """The scheme of a layer that becomes codes; None: it stays unquantized."""
    return layer.scheme if layer.has_codes else None


def leaf_of(layer: LayerPlan) -> str:
    """The last part of a layer's name."""
    return module_of(layer.info.name).rpartition(".")[2]
