"""What a model's own code looks at in its layers while it runs: their weights, and the dtypes of these."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any


def names_weight(modules: Mapping[str, Any], weight: str) -> bool:
    """Whether the code of the module around a layer names the layer's weight, whatever it does with that.

    Args:
        modules: those of a model, by name.
        weight: of the layer, as the model names it.
    """
    outer, _, leaf = weight.removesuffix(".weight").rpartition(".")
    try:
        source = inspect.getsource(type(modules[outer]).forward)
    except (OSError, TypeError):
        return False
    return re.search(rf"\bself\.{re.escape(leaf)}\.weight\b", source) is not None


class watched_weights:
    """Meanwhile every look at the weight of some layers is told to ``tell``."""

    def __init__(self, layers: Any, tell: Any) -> None:
        self._layers = list(layers)
        self._tell = tell
        self._classes: dict[type, type] = {}

    def __enter__(self) -> None:
        for layer in self._layers:
            kind = type(layer)
            if kind not in self._classes:
                self._classes[kind] = self._subclass(kind)
            layer.__class__ = self._classes[kind]

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            layer.__class__ = type(layer).__mro__[1]

    def _subclass(self, kind: type) -> type:
        tell = self._tell

        def lookup(self: Any, name: str) -> Any:
            if name == "weight":
                tell(self)
            return kind.__getattr__(self, name)  # type: ignore[attr-defined]

        return type(kind.__name__, (kind,), {"__getattr__": lookup})


def watched_dtypes(weights: Collection[int], tell: Callable[[int], None]) -> Any:
    """Meanwhile every look at the dtype of some weights, by their identity, is told to ``tell``."""
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    getter = Tensor.dtype.__get__  # type: ignore[attr-defined]

    class Watching(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function == getter and id(args[0]) in weights:
                tell(id(args[0]))
            return function(*args, **(kwargs or {}))

    return Watching()


def watched_writes(weights: Collection[int], tell: Callable[[int], Any]) -> Any:
    """Meanwhile every operation that changes some weights in place, by their identity, is told to ``tell``."""
    from torch.overrides import TorchFunctionMode

    class Watching(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(function, "__name__", "")
            in_place = name.endswith("_") and not name.startswith("__")
            if in_place and args and id(args[0]) in weights:
                tell(id(args[0]))
            return function(*args, **(kwargs or {}))

    return Watching()
