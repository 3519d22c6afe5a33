"""Free lengths of inputs that constants ask for by way of arithmetic, found by trying.

A Concat of two inputs, a Flatten of an image that was convolved and pooled, or a Reshape to a fixed width stands
between the free axes and the weight that fits one choice of them. What is asked for grows with every axis, so that
bisection finds a length that gives it, where there is one; whether the model runs on it is for the runtime to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from quantcli.conversion.onnx.tied_sizes import needs
from quantcli.core.ports import Port
from quantcli.onnx.graph.shape_trial import ShapeTrial
from quantcli.onnx.graph.values import array, is_standard

if TYPE_CHECKING:
    import onnx_ir as ir

#: What free axes are at first, in turn: those that a sum or a product leaves must be able to make up the rest.
_STARTS = (16, 8, 4, 3, 2, 1)

#: No axis is tried longer, and no graph's shapes inferred more often.
_LONGEST, _MOST_TRIALS = 1 << 15, 600

#: The part of a shape that a constant is about; None where the shape does not allow it.
_Measure = Callable[[Sequence[int]], int | None]

_Shapes = Mapping[str, Sequence[int]]
_Lengths = dict[str, int]


@dataclass(frozen=True)
class _Need:
    """What a constant asks of a value's shape."""

    value: str
    measure: _Measure
    length: int

    def found(self, shapes: _Shapes) -> int | None:
        """What the value has; None where its shape is unknown."""
        shape = shapes.get(self.value)
        return None if shape is None else self.measure(shape)


def named_axes(ports: Sequence[Port]) -> list[Port]:
    """Inputs whose free axes all have names."""
    return [
        replace(port, shape=tuple(f"{port.name}.{axis}" if dim is None else dim for axis, dim in enumerate(port.shape)))
        for port in ports
        if port.shape is not None
    ]


def first_axes(ports: Sequence[Port]) -> _Lengths:
    """The axes that count samples, of which there is one."""
    return {dim: 1 for port in ports for dim in (port.shape or ())[:1] if isinstance(dim, str)}


def solved(ports: Sequence[Port], model: ir.Model) -> Iterator[_Lengths]:
    """Choices of the lengths of free axes, by name, that meet what the graph's constants ask for, as far as one shows.

    Args:
        ports: the model's inputs, whose free axes are named; see `named_axes`.
        model: its graph.
    """
    wanted, samples = list(_needs(model)), first_axes(ports)
    names = {dim for port in ports for dim in port.shape or () if isinstance(dim, str) and dim not in samples}
    if not wanted or not names:
        return
    search = _Search(ports, ShapeTrial(model), wanted)
    seen: list[_Lengths] = []
    for start in _STARTS:
        lengths = search.improved(samples | dict.fromkeys(sorted(names), start), names)
        if lengths is not None and lengths not in seen:
            seen.append(lengths)
            yield lengths


class _Search:
    """Lengths under which ever more needs of a graph are met, in the order of its nodes."""

    def __init__(self, ports: Sequence[Port], trial: ShapeTrial, wanted: Sequence[_Need]) -> None:
        self._ports, self._trial, self._wanted = ports, trial, wanted
        self._trials = 0

    def improved(self, lengths: _Lengths, names: set[str]) -> _Lengths | None:
        """Lengths that meet every need, from those given by changing one set of axes after another; None without."""
        met = self._met(lengths)
        while met < len(self._wanted):
            for axes in self._directions(names):
                better = self._bisected(self._wanted[met], lengths, axes)
                if better is not None and (now := self._met(better)) > met:
                    lengths, met = better, now
                    break
            else:
                return None
        return lengths

    def _directions(self, names: set[str]) -> Iterator[set[str]]:
        """Axes that are changed together: those of an input, as a picture's sides are, or one."""
        seen: list[set[str]] = []
        for port in self._ports:
            own = [dim for dim in port.shape or () if isinstance(dim, str) and dim in names]
            for axes in (set(own), *({dim} for dim in reversed(own))):
                if axes and axes not in seen:
                    seen.append(axes)
                    yield axes

    def _bisected(self, need: _Need, lengths: _Lengths, axes: set[str]) -> _Lengths | None:
        """The lengths with those of some axes such that a need is met; None where none meets it."""

        def found(length: int) -> int:
            # What is too short for a window has no shape.
            return need.found(self._shapes(lengths | dict.fromkeys(axes, length))) or 0

        high = 1
        while found(high) < need.length:
            high *= 2
            if high > _LONGEST or self._trials > _MOST_TRIALS:
                return None
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if found(middle) < need.length else (low, middle)
        return lengths | dict.fromkeys(axes, high) if found(high) == need.length else None

    def _met(self, lengths: _Lengths) -> int:
        """How many needs are met before the first that is not."""
        shapes = self._shapes(lengths)
        return next(
            (count for count, need in enumerate(self._wanted) if need.found(shapes) != need.length), len(self._wanted)
        )

    def _shapes(self, lengths: _Lengths) -> _Shapes:
        self._trials += 1
        return self._trial.shapes(
            {port.name: [lengths[dim] if isinstance(dim, str) else dim or 1 for dim in port.shape or ()]
             for port in self._ports}
        )  # fmt: skip


def _needs(model: ir.Model) -> Iterator[_Need]:
    """What constants ask for, in the order of the nodes."""
    for node in model.graph:
        if is_standard(node, "Reshape") and (need := _of_reshape(node)) is not None:
            yield need
        for index, value in enumerate(node.inputs):
            if value is None or value.name is None or value.const_value is not None:
                continue
            for dim, length in needs(node, index):
                yield _Need(value.name, _length_of(dim), int(length))


def _length_of(dim: int) -> _Measure:
    """How long a dimension is."""
    return lambda shape: shape[dim] if -len(shape) <= dim < len(shape) else None


def _of_reshape(node: ir.Node) -> _Need | None:
    """As many elements as one row of the fixed shape has, beside what it takes over from the input."""
    target, value = array(node.inputs[1]), node.inputs[0]
    if target is None or value is None or value.name is None:
        return None
    kept = [axis for axis, length in enumerate(target) if length == 0]

    def elements(shape: Sequence[int]) -> int | None:
        return None if kept and kept[-1] >= len(shape) else prod(shape) // max(prod(shape[axis] for axis in kept), 1)

    fixed = prod(int(length) for length in target if length > 0)
    return _Need(value.name, elements, fixed) if fixed > 1 else None
