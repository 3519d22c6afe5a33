"""quantcli: make neural networks smaller by lowering numerical precision, and prove that they still work.

The functions are those of the command line: `inspect`, `calibrate`, `convert`, `evaluate`, `bench`. Each returns a
`quantcli.reporting.report.Report` and raises a `quantcli.errors.QuantcliError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantcli.version import __version__

if TYPE_CHECKING:
    from quantcli.commands.bench import bench
    from quantcli.commands.calibrate import calibrate
    from quantcli.commands.convert import convert
    from quantcli.commands.evaluate import evaluate
    from quantcli.commands.inspect import inspect

__all__ = ["__version__", "bench", "calibrate", "convert", "evaluate", "inspect"]


def __getattr__(name: str) -> Any:
    """Import a function, and what it needs, when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"quantcli.commands.{name}"), name)
