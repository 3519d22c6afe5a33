"""What is said where transformers does not make a model of a folder."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from quantcli.errors import InputError
from quantcli.system.text import first_line


def is_of_its_own_code(error: BaseException) -> bool:
    """Whether transformers refuses a folder because its model, or configuration, is code that lies in it."""
    return "trust_remote_code" in str(error)


def not_made(path: Path, doing: str, error: BaseException) -> InputError:
    """What a user is told of a failure of transformers; ``doing``: what it could not do with the folder: ``load``."""
    if is_of_its_own_code(error):
        return InputError(
            f"{path} has code of its own (auto_map in its config.json), which quantcli does not run, and transformers "
            "has no such model.",
            "Write a function that returns the module, and give it as package.module:function, with --weights for its "
            "weights. convert without data needs no code.",
        )
    return InputError(f"transformers {version('transformers')} cannot {doing} {path}: {first_line(error)}")
