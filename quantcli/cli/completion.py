"""Completion in the shell: commands, options and their choices."""

from __future__ import annotations

import os
from typing import Any

import shellingham
import typer
import typer.completion

from quantcli.errors import InputError

#: Typer's own scripts for every shell: used by name, though not exported for type checkers.
_scripts: Any = typer.completion

#: The name that completion is installed for, and the variable by which a shell asks for it.
PROGRAM, _VARIABLE = "quantcli", "_QUANTCLI_COMPLETE"


def prepare() -> None:
    """Where a shell asks for completions, know how it wants to be answered."""
    if _VARIABLE in os.environ:
        _scripts.completion_init()


def install(wanted: bool) -> None:
    """Write the script where the shell in use reads it, and end. Raises InputError."""
    if wanted:
        try:
            shell, path = _scripts.install(_shell(), PROGRAM, _VARIABLE)
        except OSError as error:
            raise InputError(
                f"{error.filename} cannot be written: {error.strerror}.",
                "Write the script to a place of your own: quantcli --show-completion > FILE",
            ) from error
        typer.echo(f"Completion for {shell} is in {path}; it works in a new terminal.")
        raise typer.Exit


def show(wanted: bool) -> None:
    """Print the script for the shell in use, and end. Raises InputError."""
    if wanted:
        typer.echo(_scripts.get_completion_script(prog_name=PROGRAM, complete_var=_VARIABLE, shell=_shell()))
        raise typer.Exit


def _shell() -> str:
    """The shell that runs quantcli."""
    known = ("bash", "zsh", "fish", "powershell", "pwsh")
    try:
        shell: str = shellingham.detect_shell()[0]
    except (shellingham.ShellDetectionFailure, OSError):
        shell = "this shell, whose name is not known"
    if shell not in known:
        raise InputError(
            f"There is no completion for {shell}.",
            f"Run it in one of {', '.join(known)}, or print a script: {_VARIABLE}=source_bash quantcli",
        )
    return shell
