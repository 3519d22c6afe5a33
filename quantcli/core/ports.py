"""A model's inputs and outputs by name, type and shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Port:
    """A model's input or output: a name, a numpy dtype, and a shape whose free dimensions are names or None.

    ``optional``: data may lack it. ``kind`` says what it is where it is no tensor: a sequence, optional or map.
    ``floats`` is given where nothing states the type and ``dtype`` is a guess: floating-point data becomes that,
    integers and booleans stay what they are.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None
    optional: bool = False
    kind: str = ""
    floats: np.dtype[Any] | None = None

    def dtype_of(self, have: np.dtype[Any]) -> np.dtype[Any] | None:
        """What data of a dtype becomes: a float stays a float, an integer an integer; None where it is no such data."""
        family = dtype_family(have)
        if self.dtype.kind == "O":
            return self.dtype if have.kind in "OSU" else None
        if self.floats is not None and (family != "other" or have.kind == "b"):
            return self.floats if family == "float" else have
        return self.dtype if have == self.dtype or family == dtype_family(self.dtype) != "other" else None

    def __str__(self) -> str:
        if self.kind:
            return f"{self.name}: {self.kind}"
        if self.floats is not None and self.shape is None:
            return f"{self.name}: any tensor"
        dims = "any shape" if self.shape is None else " x ".join(str(d) if d is not None else "?" for d in self.shape)
        return f"{self.name}: {self.dtype} {dims or 'scalar'}"


#: A sample's arrays by input name, and a model's by output name.
Arrays: TypeAlias = "dict[str, np.ndarray]"


#: What inputs of a decoder begin with that hold the cache of the tokens before, and outputs that hold the next one.
CACHE_INPUT, CACHE_OUTPUT = "past_key_values.", "present."


def cache_ports(ports: Iterable[Port]) -> tuple[Port, ...]:
    """Those inputs of a decoder that hold a key-value cache ``[batch, heads, tokens so far, head size]``."""
    return tuple(port for port in ports if port.name.startswith(CACHE_INPUT) and len(port.shape or ()) == 4)


def without_cache(ports: Iterable[Port]) -> tuple[Port, ...]:
    """What a model is given to read: its inputs but for a cache, which begins empty."""
    ports = tuple(ports)
    cache = cache_ports(ports)
    return tuple(port for port in ports if port not in cache)


def dtype_family(dtype: np.dtype[Any]) -> str:
    """``integer``, ``float`` or another family of a dtype: what may be cast to each other."""
    import numpy as np

    # The types of ml_dtypes, such as bfloat16 and int4, numpy does not count among its own.
    if np.issubdtype(dtype, np.integer) or dtype.name.removeprefix("u") in ("int2", "int4"):
        return "integer"
    return "float" if np.issubdtype(dtype, np.floating) or "float" in dtype.name else "other"


def tensors_of(value: Any) -> Iterator[np.ndarray]:
    """The tensors of an output, which may be a sequence or maps; an optional that is empty has none."""
    import numpy as np

    if isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)
    elif isinstance(value, dict):
        yield from (np.array(list(value)), np.array(list(value.values())))
    elif value is not None:
        yield np.asarray(value)


def is_table_of_maps(value: Any) -> bool:
    """Whether an output is one map for each sample, all with the same keys, as classifiers of scikit-learn return."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and each.keys() == value[0].keys() for each in value)
    )
