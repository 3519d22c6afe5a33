"""quantcli: make neural networks smaller by lowering numerical precision, and prove that they still work.

The functions are those of the command line: `inspect`, `calibrate`, `convert`, `evaluate`, `bench`. Each returns a
`quantcli.report.Report` and raises a `quantcli.errors.QuantcliError`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from quantcli.version import __version__

if TYPE_CHECKING:
    from quantcli.bench import bench
    from quantcli.calibrate import calibrate
    from quantcli.convert import convert
    from quantcli.evaluate import evaluate
    from quantcli.inspect import inspect

__all__ = ["__version__", "bench", "calibrate", "convert", "evaluate", "inspect"]


def __getattr__(name: str) -> Any:
    """Import a function, and what it needs, when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"quantcli.{name}"), name)


class _Package(ModuleType):
    """Lets no module take the place of the function of the same name, as Python does once it is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
