"""The exceptions quantcli raises on purpose, each with the exit status the command line returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class QuantcliError(Exception):
    """A failure with a message meant for the user.

    The message is one paragraph that says what is wrong and where; ``hint`` says what to do next.
    """

    exit_code = 4

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class UsageError(QuantcliError):
    """Flags, a recipe or a gate expression that cannot be meant."""

    exit_code = 2


class BudgetError(QuantcliError):
    """A budget that nothing found keeps; ``details`` tell what was tried, and what could be kept."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, hint)
        self.details = dict(details or {})


class InputError(QuantcliError):
    """Something given is missing, corrupt or unsupported, or cannot be written."""

    exit_code = 3


class NotProvenError(InputError):
    """An artifact is written, and what was to prove that it works gave no answer: it is kept aside, to be continued."""


class DiskFullError(InputError):
    """The disk has no room for an output."""


class RankError(QuantcliError):
    """Another process that shared the work ended: what is written so far stays, and the same command continues."""

    exit_code = 130


class MissingExtraError(InputError):
    """A package that this work needs is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}, which is not installed.",
            hint=f'Install it with: pip install "quantcli[{extra}]"',
        )


class VerificationError(QuantcliError):
    """What was written does not decode to what was meant: a defect of quantcli or of the disk."""

    exit_code = 4
