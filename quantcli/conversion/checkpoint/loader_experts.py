"""Fused experts of a file that transformers runs as codes only where they are stored one by one.

Runs in a process apart. Each answer is what `quantcli.checkpoint.split_experts.SplitExperts` takes: by the name of a
fused tensor, the parts that it is made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantcli.models.stored_parameters import MergedExperts

_Parts = list[dict[str, Any]]


def held_one_by_one(modules: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, _Parts]:
    """Fused experts that the library holds as layers.

    Args:
        modules: the library's, by name.
        shapes: of the file's tensors that the library has no parameter for, by name.
    """
    found = {}
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        # The file's path to the experts is the library's own here, but for what it puts in front.
        inside = [key for key in modules if f".{path}".endswith(f".{key}") or key.endswith(f".{path}")]
        experts = modules[max(inside, key=len)] if len(shape) == 3 and inside else None
        children = list(experts.children()) if experts is not None else []
        leaves = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else [leaf]
        if not children or len(children) != shape[0]:
            continue
        if not all(hasattr(child, each) for child in children for each in leaves):
            continue
        rows, columns = getattr(children[0], leaves[0]).weight.shape
        turned = [columns, rows * len(leaves)] == list(shape[1:])
        if turned or [rows * len(leaves), columns] == list(shape[1:]):
            names = [f"{path}.{{}}.{each}.weight" for each in leaves]
            found[name] = _parts(names, len(children), (rows, columns), turned=turned)
    return found


def stacked_as_loaded(model: Any, shapes: Mapping[str, Sequence[int]], loaded: Mapping[str, str]) -> dict[str, _Parts]:
    """Fused experts that the library would stack itself, as it loads them, were they stored one by one.

    Args:
        model: the library's model, on the meta device.
        shapes: of the file's tensors, by name.
        loaded: the parameter that each of them is loaded as, as it is.
    """
    merged, known = MergedExperts(model), dict(model.state_dict())
    found = {}
    for name, shape in shapes.items():
        if len(shape) != 3 or tuple(shape) != tuple(known[loaded[name]].shape):
            continue
        names = merged.parts(name, loaded[name])
        if names and shape[1] % len(names) == 0:
            found[name] = _parts(names, shape[0], (shape[1] // len(names), shape[2]), turned=False)
    return found


def _parts(names: Sequence[str], experts: int, shape: tuple[int, int], *, turned: bool) -> _Parts:
    """``names``: of the parts that are joined by rows, with ``{}`` for the expert's number; ``shape``: of each."""
    return [
        {
            "name": name.format(expert),
            "expert": expert,
            "first": shape[0] * index,
            "shape": list(shape),
            "turned": turned,
        }
        for expert in range(experts)
        for index, name in enumerate(names)
    ]
