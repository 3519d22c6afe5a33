"""Inputs that are made up: of the right types and shapes, with indices that lie within their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from quantcli.core.ports import Arrays, Port
from quantcli.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

#: Makes up float32 values of a shape.
Draw: TypeAlias = "Callable[[np.random.Generator, Sequence[int]], np.ndarray]"

#: Tokens of a sequence, and pixels of a side, where neither the user nor the model says it.
DEFAULT_LENGTH, DEFAULT_SIDE = 128, 224

#: Operators that hand an input on, so that what reads their output still looks up by it.
_HAND_ON = frozenset(
    ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Transpose", "Slice", "Expand", "Concat",
     "Tile", "Where", "Split", "Gather", "Max", "Min", "Clip")
)  # fmt: skip

#: By operator, the input that is an index, and the one that it is looked up in.
_LOOKUPS = {
    "Gather": ((1, 0),),
    "GatherBlockQuantized": ((1, 0),),
    "EmbedLayerNormalization": ((0, 2), (1, 4)),
}

#: What integers and truth values are. All ones are what a text without padding has, and let a model do all of its
#: work; where a one means padding, zeros do; where they say how much of a sound there is, lengths do. None tells one
#: branch, or one masked value, from another: mixed do.
FILLS = ("ones", "zeros", "lengths", "mixed")

#: What floats are drawn from. Logarithms and roots have no value below zero, others none beyond one or below it; in
#: noise around zero a detector may find nothing, where it does among values as large as those of pixels.
SPREADS = ("normal", "below one", "above one", "pixels")


def made_up_feeds(
    ports: Sequence[Port],
    size: int,
    seq_len: int | None,
    seed: int,
    *,
    side: int = DEFAULT_SIDE,
    tables: Mapping[str, int] | None = None,
    fill: str = "ones",
    spread: str = "normal",
    draws: Mapping[str, Draw] | None = None,
    axes: Mapping[str, int] | None = None,
) -> Arrays:
    """Inputs of ``size`` samples: normal floats from a seed, ones for integers (ids, masks) and truth values.

    An axis that has the name of the first input's first one counts samples, wherever it stands; axes of equal names
    are equally long. Integers that are indices of one of ``tables`` are any of it. A
    sequence holds two equal tensors.

    Args:
        ports: the model's inputs.
        size: how many samples.
        seq_len: tokens of a sequence.
        seed: what is drawn by it.
        side: pixels of a side.
        tables: entries of the table that an input is looked up in, by its name.
        fill: one of `FILLS`, for integers that are no indices, and truth values.
        spread: one of `SPREADS`.
        draws: what makes up floats of an input, by its name, in place of ``spread``.
        axes: lengths of axes by their names, in place of all the others.

    Raises:
        InputError: the model does not tell how many dimensions an input has, or what its elements are.
    """
    import numpy as np

    from quantcli.models.inputs import derived_inputs

    generator = np.random.default_rng(seed)
    length = seq_len or DEFAULT_LENGTH
    shapes = lengths(ports, size, length, side, axes)
    found: Arrays = {}
    for port in ports:
        if port.optional and port.shape is None:
            continue
        if port.shape is None or port.dtype.kind not in "iufbVO":
            raise InputError(f"The model does not tell the shape of its input {port}.", "Give real ones with --data.")
        shape = shapes[port.name]
        most = (tables or {}).get(port.name)
        if port.dtype.kind == "O":
            found[port.name] = np.full(shape, "text", dtype=object)
        elif port.dtype.kind in "iu" and most is not None:
            found[port.name] = generator.integers(0, max(most, 1), shape).astype(port.dtype)
        elif port.dtype.kind in "iub":
            value = {"ones": 1, "lengths": length}.get(fill, 0)
            filled = generator.integers(0, 2, shape) if fill == "mixed" else np.full(shape, value)
            found[port.name] = filled.astype(port.dtype)
        else:
            draw = (draws or {}).get(port.name)
            values = draw(generator, shape) if draw else _floats(generator, shape, spread)
            found[port.name] = values.astype(port.dtype)
        if "seq(" in port.kind:
            found[port.name] = [found[port.name]] * 2  # type: ignore[assignment]
    derived = derived_inputs(found["input_ids"]) if "input_ids" in found else {}
    # Masks, types and positions are what a tokenizer would give for a text without padding.
    return {
        name: np.asarray(derived[name], dtype=value.dtype)
        if name in derived and value.shape == derived[name].shape
        else value
        for name, value in found.items()
    }


def _floats(generator: np.random.Generator, shape: Sequence[int], spread: str) -> np.ndarray:
    import numpy as np

    normal = np.asarray(generator.standard_normal(shape, dtype=np.float32))
    if spread == "normal":
        return normal
    if spread == "pixels":
        return np.clip(128 + 64 * normal, 0, 255)
    return np.abs(normal) + 1 if spread == "above one" else np.clip(np.abs(normal), 0.05, 3.0) / 4


def counts_samples(ports: Sequence[Port]) -> str | None:
    """The name of the axis that counts samples, which is the first of an input whose first axis is free."""
    return next((port.shape[0] for port in ports if port.shape and isinstance(port.shape[0], str)), None)


def lengths(
    ports: Sequence[Port], size: int, length: int, side: int, axes: Mapping[str, int] | None = None
) -> dict[str, list[int]]:
    """The shape of every made-up input, by name. Arguments are those of `made_up_feeds`."""
    batch = counts_samples(ports)
    known = ({} if batch is None else {batch: size}) | dict(axes or {})
    shapes: dict[str, list[int]] = {}
    for port in ports:
        shape = []
        for axis, given in enumerate(port.shape or ()):
            if isinstance(given, int):
                shape.append(given)
                continue
            if given in known:
                shape.append(known[given])
                continue
            if axis == 0:
                value = size
            elif len(port.shape or ()) == 4:
                value = 3 if axis == 1 else side
            else:
                value = length
            if given is not None:
                value = _summed(given, known, length) or value
                known[given] = value
            shape.append(value)
        shapes[port.name] = shape
    return shapes


def _summed(name: str, known: dict[str, int], length: int) -> int | None:
    """The length of an axis that is named as a sum of others, such as ``past_length + length``."""
    parts = [part.strip() for part in name.split("+")]
    if len(parts) < 2:
        return None
    # What is of a length of its own further down has that length here as well.
    return sum(int(part) if part.isdigit() else known.setdefault(part, length) for part in parts)


def table_sizes(model: ir.Model) -> dict[str, int]:
    """How many entries the smallest table has that each input looks up in, for inputs that do."""
    found = {}
    for value in model.graph.inputs:
        sizes = [size for size in _looked_up(value, set()) if size is not None]
        if value.name and sizes:
            found[value.name] = min(sizes)
    return found


def _looked_up(value: ir.Value, seen: set[ir.Value]) -> Iterator[int | None]:
    if value in seen:
        return
    seen.add(value)
    for use in value.uses():
        node = use.node
        for index, table in _LOOKUPS.get(node.op_type, ()):
            if use.idx == index and table < len(node.inputs):
                axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                yield _entries(node.inputs[table], axis)
        if node.op_type in _HAND_ON:
            for output in node.outputs:
                yield from _looked_up(output, seen)


def _entries(table: ir.Value | None, axis: int) -> int | None:
    if table is None or table.shape is None or not -len(table.shape) <= axis < len(table.shape):
        return None
    size = table.shape[axis]
    return size if isinstance(size, int) else None
