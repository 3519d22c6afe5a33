"""How much of an artifact is run: all of it, or where memory is short one block of each kind and the last.

A model is a list of blocks, most of them alike. Blocks of the same tensors, shapes and schemes are of one kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from quantcli.conversion.checkpoint.layout import Layout
from quantcli.planning.plan import LayerPlan, Plan

#: What torch, transformers and their kind take before the first tensor.
LIBRARIES_BYTES = 600 << 20
#: Bytes a value of the largest layer takes on top, while the library decodes it: unpacked, scaled and rounded.
_WORK = 12
_NOWHERE = ("", "", "")


class Blocks:
    """The lists of blocks of a model, as the library has loaded it, with the tensors of a plan in them.

    ``lists``: by the path of each list the keys of its blocks. ``places``: by tensor the list, the key of the block,
    and the name in it.
    """

    def __init__(
        self, plan: Plan, layout: Layout, lists: Mapping[str, list[str]], places: Mapping[str, tuple[str, str, str]]
    ) -> None:
        self._plan, self._layout, self._lists, self._places = plan, layout, lists, places

    def needed_bytes(self, keep: Mapping[str, list[str]]) -> int:
        """Memory that the library takes to load and run the model, or the blocks that are kept of some lists."""
        there = list(self._there(keep))
        held = sum(self._held_bytes(layer) for layer in there)
        return LIBRARIES_BYTES + held + _WORK * max((prod(layer.matrix_shape) for layer in there), default=0)

    def one_of_each_kind(self) -> dict[str, list[str]]:
        """The first block of each kind in every list, and the list's last, in the list's order."""
        return {path: self._one_of_each_kind(path, keys) for path, keys in self._lists.items()}

    def ends(self) -> dict[str, list[str]]:
        """The first and the last block of every list."""
        return {path: [keys[0], keys[-1]] for path, keys in self._lists.items()}

    def counts(self, keep: Mapping[str, list[str]]) -> tuple[int, int]:
        """Quantized layers that are there, and of how many."""
        return sum(layer.has_codes for layer in self._there(keep)), sum(layer.has_codes for layer in self._plan.layers)

    def described(self, keep: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
        """For the manifest: which blocks are kept, and of how many."""
        return {path: {"run": list(keys), "of": len(self._lists[path])} for path, keys in keep.items()}

    def _there(self, keep: Mapping[str, list[str]]) -> Iterator[LayerPlan]:
        for layer in self._plan.layers:
            path, key, _ = self._places.get(layer.info.name, _NOWHERE)
            if not layer.dropped and (path not in keep or key in keep[path]):
                yield layer

    def _held_bytes(self, layer: LayerPlan) -> int:
        stored = sum(spec.nbytes for spec in self._layout.layer_specs[layer.info.name].values())
        if not layer.has_codes or self._plan.format == "bitsandbytes":
            return stored
        # Codes are unpacked before the first layer runs, all of them.
        return stored + layer.info.numel * {"F32": 4, "F64": 8}.get(self._plan.dtype, 2)

    def _one_of_each_kind(self, path: str, keys: list[str]) -> list[str]:
        tensors: dict[str, list[tuple[str, Any, Any]]] = {key: [] for key in keys}
        for layer in self._plan.layers:
            place, key, leaf = self._places.get(layer.info.name, _NOWHERE)
            if place == path:
                tensors[key].append((leaf, layer.info.shape, layer.scheme))
        kinds: dict[Any, str] = {}
        for key in keys:
            kinds.setdefault(tuple(tensors[key]), key)
        kept = {*kinds.values(), keys[-1]}
        return [key for key in keys if key in kept]
