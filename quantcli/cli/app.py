"""The command line as a program: its exit statuses, and errors in one paragraph."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import typer

from quantcli.cli import completion
from quantcli.cli.commands import app
from quantcli.cli.terminal import Ui
from quantcli.errors import InputError, QuantcliError
from quantcli.system import ranks

#: Exit status after Ctrl-C or a termination signal; newer versions of typer return it themselves.
_INTERRUPTED = 130

#: What typer raises for a wrong command line. Whether it comes from click or from the copy of click that
#: newer versions of typer carry, typer's own BadParameter descends from it.
_CommandLineError: type[Any] = typer.BadParameter.__mro__[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0 done; 1 a gate failed, the report is written even so; 2 the command line or a recipe cannot be meant; 3 something
    given is missing, corrupt or not supported, or an extra is not installed; 4 a defect of quantcli; 130 interrupted.
    """
    ui = Ui()
    ranks.silence()
    if not sys.warnoptions:
        # What libraries warn of is for developers; `python -W` still shows it.
        warnings.simplefilter("ignore")
    if not logging.root.handlers:
        # Else Python writes what libraries log to stderr, tracebacks of what they get over by themselves included.
        logging.root.addHandler(logging.NullHandler())
    signal.signal(signal.SIGTERM, _interrupt)
    completion.prepare()
    arguments = None if argv is None else list(argv)
    try:
        status = app(arguments, completion.PROGRAM, obj=ui, standalone_mode=False)
        if status == _INTERRUPTED:
            raise KeyboardInterrupt
        if isinstance(status, int):
            return status
    except ranks.Dismissed:
        return 0
    except typer.Exit as stop:
        return int(stop.exit_code)
    except _CommandLineError as error:
        ui.fail(_problem(error), f"See: {_place(error, arguments)} --help")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        ui.fail("Interrupted.", "The same command continues where it stopped.")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away, as `head` does; that is no failure of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except QuantcliError as error:
        return _failed(ui, error, error.message, error.hint, error.exit_code)
    except Exception as error:
        return _unexpected(ui, error)
    return 0


def _unexpected(ui: Ui, error: Exception) -> int:
    """Tell of an error that is not meant for the user: of memory that was not to be had, or of a defect."""
    from quantcli.system.child import is_out_of_memory

    # torch has errors of its own for it.
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_out_of_memory(str(error))):
        if "CUDA" in str(error):
            hint = "Use shorter sequences (--seq-len), or leave out --device cuda."
            return _failed(ui, error, "The GPU has not enough memory.", hint, InputError.exit_code)
        return _failed(ui, error, "There is not enough memory.", "Use fewer --threads.", InputError.exit_code)
    message = f"This is a defect of quantcli: {type(error).__name__}: {error}"
    return _failed(ui, error, message, "Run again with --debug and report what it prints.", QuantcliError.exit_code)


def _place(error: Any, arguments: list[str] | None) -> str:
    """The command that an error is about; the parser does not tell it where an option lacks its value."""
    if context := getattr(error, "ctx", None):
        return str(context.command_path)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    first = next(iter(sys.argv[1:] if arguments is None else arguments), "")
    return f"{completion.PROGRAM} {first}" if first in commands else completion.PROGRAM


def _problem(error: Any) -> str:
    """What is wrong with a command line, as sentences: the parser's messages end without a stop."""
    likely = getattr(error, "possibilities", None)
    if likely:
        return f"{error.message.rstrip('.')}. Did you mean {' or '.join(sorted(likely))}?"
    # The parser says twice that a number is none: as what it should be, and as what could not be parsed.
    message = str(error.format_message()).partition(", unable to parse")[0]
    message = message.replace(": Input should be ", ": it should be ").strip()
    return message if message.endswith((".", "?")) else f"{message}."


def _failed(ui: Ui, error: BaseException, message: str, hint: str | None, status: int) -> int:
    if ui.debug:
        import traceback

        traceback.print_exception(error)
    ui.fail(message, hint)
    return status


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
