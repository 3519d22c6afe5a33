"""A user's own Python function, named as ``package.module:function``: a model, a data source or a metric."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quantcli.errors import InputError
from quantcli.system.text import first_line

#: On Windows C:model is a path, relative to the current folder of drive C.
_HAS_DRIVES = os.name == "nt"

_SPEC = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)")


def is_function(spec: str) -> bool:
    """Whether a text names a function rather than a path. A path that exists is always a path."""
    match = _SPEC.fullmatch(spec)
    if not match or Path(spec).exists():
        return False
    return not _HAS_DRIVES or len(match[1]) > 1


def load_function(spec: str) -> Callable[..., Any]:
    """The function of this name. The current folder is importable, as it is with ``python -m``.

    Raises:
        InputError: it is not named as ``package.module:function``, its module is missing or fails, or holds no
            such function.
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise InputError(f"{spec} does not name a function.", "Write it as package.module:function.")
    module_name, function_name = match.groups()
    with _current_folder_importable():
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # whatever the user's code raises while it is imported
            raise _import_failure(spec, module_name, error) from error
    if not hasattr(module, function_name):
        known = ", ".join(_functions(module)) or "none"
        raise InputError(f"{module_name} has no {function_name}.", f"Its own functions: {known}.")
    function = getattr(module, function_name)
    if not callable(function):
        raise InputError(f"{spec} is not a function: it is {type(function).__name__}.")
    return function  # type: ignore[no-any-return]


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the module may have changed the path itself
            sys.path.remove(folder)


def _import_failure(spec: str, module_name: str, error: Exception) -> InputError:
    packages = {module_name[:end] for end in range(1, len(module_name) + 1) if module_name[end : end + 1] in ("", ".")}
    if isinstance(error, ModuleNotFoundError) and error.name in packages:
        return InputError(
            f"There is no module {error.name}, which {spec} names.",
            "It is looked for in the current folder and where Python finds its packages.",
        )
    reason = f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__
    return InputError(f"{module_name} cannot be imported: {reason}.")


def _functions(module: Any) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
