"""What a user needs, in place of how to get it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from quantcli.core.scheme import PRESETS
from quantcli.errors import MissingExtraError, UsageError
from quantcli.system.text import suggestion

#: The name of what stays as it is, among schemes.
FLOAT = "float"


@dataclass(frozen=True)
class Budget:
    """Ceilings of a conversion, and how a mix of schemes that keeps them is searched for.

    Attributes:
        max_size: bytes of everything that is published.
        max_drop: what the metric may lose, in its own unit.
        metric: which one; by default the task's first.
        max_kl: nats that outputs may diverge by.
        max_latency_p50: milliseconds of a run, half of the runs being faster; of ONNX.
        eval_data: what the result is judged on; by default a part of the data that the search does not see.
        allow: schemes to choose from; `FLOAT`, or in a checkpoint a cast, is for layers that stay as they are.
        sensitivity: a file that keeps what was learned of the model.
        search_seconds: how long the search may take.
        pareto: a file for the frontier of size against accuracy.
    """

    max_size: int | None = None
    max_drop: float | None = None
    metric: str | None = None
    max_kl: float | None = None
    max_latency_p50: float | None = None
    eval_data: str | None = None
    allow: tuple[str, ...] = ()
    sensitivity: Path | None = None
    search_seconds: float | None = None
    pareto: Path | None = None

    @property
    def is_asked_for(self) -> bool:
        """Whether there is anything to search for."""
        return bool(self.ceilings)

    @property
    def ceilings(self) -> dict[str, float]:
        """The limits that are set, by option."""
        known = {
            "--max-size": self.max_size,
            "--max-drop": self.max_drop,
            "--max-kl": self.max_kl,
            "--max-latency-p50": self.max_latency_p50,
        }
        return {name: value for name, value in known.items() if value is not None}

    @property
    def judges_outputs(self) -> bool:
        """Whether outputs have to be measured."""
        return self.max_drop is not None or self.max_kl is not None

    def scaled(self, factor: float) -> Budget:
        """The same with limits on outputs so many times as wide."""
        drop, kl = (None if each is None else factor * each for each in (self.max_drop, self.max_kl))
        return replace(self, max_drop=drop, max_kl=kl)

    def require_used(self) -> None:
        """Raise UsageError for an option that does nothing without a limit that is not set."""
        stray = {
            "--metric": self.metric and self.max_drop is None,
            "--eval-data": self.eval_data and not self.is_asked_for,
            "--allow": self.allow and not self.is_asked_for,
            "--sensitivity": self.sensitivity and not self.is_asked_for,
            "--search-time": self.search_seconds and not self.is_asked_for,
            "--pareto": self.pareto and not self.is_asked_for,
        }
        for option, is_stray in stray.items():
            if is_stray:
                need = "--max-drop" if option == "--metric" else "a budget, such as --max-size 80MB"
                raise UsageError(f"{option} goes with {need}.")

    def checked(self, *, onnx: bool, data: bool) -> Budget:
        """The same budget with the schemes that it may choose from.

        Args:
            onnx: whether the result is ONNX.
            data: whether there is data to calibrate on.

        Raises:
            UsageError: options that do not go together.
            MissingExtraError: SciPy, which solves integer programs and knows distributions, is not installed.
        """
        self.require_used()
        for option, value in self.ceilings.items():
            if value <= 0 and option != "--max-drop":
                raise UsageError(f"{option} {value:g} cannot be kept: it must be more than 0.")
        if self.max_drop is not None and self.max_drop < 0:
            raise UsageError(f"--max-drop {self.max_drop:g} is less than 0: it is what the metric may lose.")
        if self.max_latency_p50 is not None and not onnx:
            raise UsageError("--max-latency-p50 is for ONNX, whose runs can be measured.", "Use --format onnx.")
        if self.judges_outputs and not (data or self.eval_data):
            raise UsageError(
                f"{' and '.join(self.ceilings)} needs data to judge the outputs on.",
                "Name some with --data, and what decides with --eval-data.",
            )
        if find_spec("scipy") is None:
            raise MissingExtraError("scipy", "search", "Choosing schemes for a budget")
        return replace(self, allow=self.allow or _default_schemes(onnx=onnx, data=data))


def _default_schemes(*, onnx: bool, data: bool) -> tuple[str, ...]:
    if not onnx:
        return ("int4", "int8", "bf16")
    return (FLOAT, *(("int8-static",) if data else ()), "int8-dynamic", "int4")


def parse_allow(text: str) -> tuple[str, ...]:
    """Schemes from ``int4,int8,bf16``. Raises UsageError for an unknown one."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name != FLOAT and name not in PRESETS:
            raise UsageError(f"--allow: unknown scheme {name!r}. {suggestion(name, [FLOAT, *PRESETS])}")
    if len(names) < 2:
        raise UsageError(f"--allow {text}: name at least two schemes to choose from, such as int4,int8,float.")
    return names


def parse_milliseconds(text: str) -> float:
    """``5ms`` or ``0.005s`` or ``5`` as milliseconds. Raises UsageError."""
    return _parse(text, {"ms": 1.0, "s": 1000.0, "": 1.0}, "--max-latency-p50", "5ms")


def parse_seconds(text: str) -> float:
    """``90s``, ``10m`` or ``1h`` (or a number of seconds) as seconds. Raises UsageError."""
    return _parse(text, {"s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}, "--search-time", "10m")


def _parse(text: str, units: dict[str, float], option: str, example: str) -> float:
    for unit in sorted(units, key=len, reverse=True):
        number = text.strip().lower()
        if number.endswith(unit):
            try:
                value = float(number.removesuffix(unit))
            except ValueError:
                continue
            if 0 < value < float("inf"):
                return value * units[unit]
    raise UsageError(f"{option} {text!r} is no length of time.", f"Write for example: {option} {example}")
