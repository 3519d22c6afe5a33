"""An artifact's outputs beside those of its model, on the same inputs: of the data, or made up where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from quantcli.core.ports import Arrays, dtype_family
from quantcli.data.made_up import made_up_feeds, table_sizes
from quantcli.data.samples import Samples, batches
from quantcli.errors import InputError
from quantcli.models.session import Session

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

#: Samples that the artifact and its source both run at the end.
COMPARED_SAMPLES = 8

#: An artifact this much slower than its model is worth a word.
_SLOW = 0.8

#: Lengths of sequences and sides of images that are tried, in turn, where the model leaves them open.
_SIZES = ((16, 64), (128, 224), (8, 8), (4, 4), (2, 2), (3, 3), (1, 1), (32, 32), (64, 128))

#: Samples of a made-up feed; the second one only where the model takes it.
_BATCHES = (1, 2)

REPORT_IT = "Nothing was written. Leave layers out with --skip, or choose another scheme; and please report it."


@dataclass(frozen=True)
class Comparison:
    """Two models on the same inputs: signal to noise of all float outputs together, and of each; how long they took.

    ``made_up`` says that the inputs were. ``speed``: the reference's median time over the candidate's. A hint only,
    since nothing was warmed up or repeated; None for a single sample.
    """

    samples: int
    sqnr_db: float | None
    speed: float | None = None
    outputs: Mapping[str, float | None] = field(default_factory=dict)
    made_up: bool = False

    @property
    def warnings(self) -> list[str]:
        """A word where the candidate is slow."""
        if self.speed is None or self.speed >= _SLOW or self.made_up:
            return []
        return [
            f"On these samples the artifact ran {self.speed:.2g} times as fast as the model; quantcli bench "
            "measures that properly."
        ]

    def to_json(self) -> dict[str, Any]:
        """For a manifest. How long it took goes into the report alone: an artifact holds no times."""
        return {"samples": self.samples, "sqnr_db": self.sqnr_db}


@dataclass(frozen=True)
class NotCompared:
    """Why outputs were not compared: the model itself does not run on what can be made up."""

    reason: str

    @property
    def warnings(self) -> list[str]:
        """What the user can do."""
        return [
            f"The artifact's outputs were not compared with the model's: {self.reason} Give --data to compare them."
        ]


#: Feeds with the number of samples in each, anew for each pass.
Feeds = Callable[[], Iterable[tuple[Mapping[str, "np.ndarray"], int]]]


def of_samples(samples: Samples, most: int) -> Feeds:
    """The first samples, as many at a time as the model takes."""

    def feeds() -> Iterator[tuple[Mapping[str, np.ndarray], int]]:
        done = 0
        for arrays, labels in batches(samples, 1):
            yield arrays, len(labels)
            done += len(labels)
            if done >= most:
                return

    return feeds


def made_up(reference: Session, graph: ir.Model) -> Feeds | NotCompared:
    """Feeds that a model runs on, at a second number of samples where it takes that, or why there are none."""
    tables, reason = table_sizes(graph), "it has no inputs that can be made up."
    for length, side in _SIZES:
        found: list[tuple[Arrays, int]] = []
        for size in _BATCHES:
            try:
                feeds = made_up_feeds(reference.inputs, size, length, size, side=side, tables=tables)
                reference.run(feeds)
            except InputError as error:
                reason = f"on made-up inputs, {error.message[0].lower()}{error.message[1:]}"
                break
            found.append((feeds, size))
            if not _grows(found[0][0], feeds) and size > 1:
                found.pop()
        if found:
            return lambda: found
    return NotCompared(reason)


def _grows(one: Arrays, other: Arrays) -> bool:
    return any(one[name].shape != other[name].shape for name in one)


class OutputComparison:
    """Candidates against one reference on the same feeds.

    The reference runs once; its outputs are kept in a folder, since those of a language model may not fit in memory.
    ``loose``: an output may have another shape, where shapes follow from values; it is not compared then.
    """

    def __init__(
        self,
        reference: Path | Session,
        feeds: Feeds,
        folder: Path,
        *,
        made_up: bool = False,
        loose: bool = False,
    ) -> None:
        self.reference, self.feeds, self.folder, self.made_up, self.loose = reference, feeds, folder, made_up, loose
        self._kept: list[list[str]] = []
        self._kinds: list[list[str]] = []

    def against(self, candidate: Path, name: str | None = None, *, literal: bool = False) -> Comparison:
        """Run a candidate; the first one in turn with the reference, so that ``speed`` is known of that one alone.

        ``name`` is what errors call it. ``literal`` runs it as it is written, without kernels that the runtime would
        put in the place of its operators.

        Raises:
            InputError: a model does not run, the candidate's outputs are others than the reference's, or they are not
                finite where the reference's are.
        """
        import numpy as np

        from quantcli.core.numerics import decibels

        session = Session(candidate, optimize=not literal, name=name)
        reference = None
        if not self._kept:
            reference = self.reference if isinstance(self.reference, Session) else Session(self.reference)
            _require_ports(reference, session)
        powers: dict[str, tuple[float, float]] = {}
        times: list[tuple[float, float]] = []
        samples = 0
        for number, (feeds, count) in enumerate(self.feeds()):
            samples += count
            if reference is None:
                expected, (got, _) = self._load(number), _candidate(session, feeds)
            else:
                outputs, ours = _timed(reference, feeds)
                got, theirs = _candidate(session, feeds)
                expected = self._keep(outputs)
                times.append((ours, theirs))
            same = _require_shapes(self._kinds[number], got, loose=self.loose)
            for key, values in expected.items():
                if key not in same:
                    continue
                wide, other = values.astype(np.float64), got[key].astype(np.float64)
                finite = np.isfinite(wide)
                if not np.isfinite(other[finite]).all():
                    raise InputError(
                        f"The output {key} of the artifact is not finite where the original's is.", REPORT_IT
                    )
                signal, noise = powers.get(key, (0.0, 0.0))
                with np.errstate(over="ignore"):
                    signal += float(np.square(wide[finite]).sum())
                    noise += float(np.square(wide[finite] - other[finite]).sum())
                powers[key] = signal, noise
        # The first run of a session also prepares its memory.
        later = times[1:]
        speed = median(ours for ours, _ in later) / median(theirs for _, theirs in later) if later else None
        total = (sum(signal for signal, _ in powers.values()), sum(noise for _, noise in powers.values()))
        each = {key: _db(*power) for key, power in powers.items()}
        return Comparison(samples, decibels(*total), speed, each, self.made_up)

    def repeats(self) -> bool:
        """Whether the reference returns the same when it is run again; random numbers are others in each run."""
        import numpy as np

        session = self.reference if isinstance(self.reference, Session) else Session(self.reference)
        feeds, _ = next(iter(self.feeds()))
        again = session.run(feeds)
        return all(np.allclose(values, again[key], equal_nan=True) for key, values in self._load(0).items())

    def _keep(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """Set the floating-point outputs of the next sample aside, and return them."""
        import numpy as np

        self._kinds.append([_kind(value) for value in outputs.values()])
        floats = {
            name: values
            for name, values in outputs.items()
            if isinstance(values, np.ndarray) and dtype_family(values.dtype) == "float"
        }
        stored = (values if values.dtype.isbuiltin else values.astype(np.float32) for values in floats.values())
        np.savez(self._file(len(self._kept)), *stored)
        self._kept.append(list(floats))
        return floats

    def _load(self, number: int) -> dict[str, Any]:
        import numpy as np

        with np.load(self._file(number)) as arrays:
            return dict(zip(self._kept[number], (arrays[key] for key in arrays.files), strict=True))

    def _file(self, number: int) -> Path:
        return self.folder / f"expected_{number}.npz"


def _db(signal: float, noise: float) -> float | None:
    """Signal to noise; None: the same, minus infinity: noise where there is no signal."""
    from quantcli.core.numerics import decibels

    return float("-inf") if noise > 0 and not signal > 0 else decibels(signal, noise)


def _require_ports(reference: Session, candidate: Session) -> None:
    """Raise InputError where inputs or outputs have other names, another order or other types."""
    for what in ("inputs", "outputs"):
        before, after = (
            [f"{port.name} ({getattr(port, 'kind', '') or port.dtype})" for port in getattr(session, what)]
            for session in (reference, candidate)
        )
        if before != after:
            raise InputError(
                f"The artifact's {what} would be {', '.join(after) or 'none'}; those of the model are "
                f"{', '.join(before) or 'none'}.",
                REPORT_IT,
            )


def _require_shapes(kinds: list[str], got: Mapping[str, Any], *, loose: bool) -> set[str]:
    """Names of outputs of the same type and shape as the reference's.

    Raises:
        InputError: one is of another type, or has another shape and ``loose`` does not allow for it.
    """
    same = set()
    for wanted, (name, value) in zip(kinds, got.items(), strict=True):
        found = _kind(value)
        if wanted == found:
            same.add(name)
        elif not loose or wanted.split()[0] != found.split()[0] or wanted.count(" x ") != found.count(" x "):
            raise InputError(
                f"The output {name} of the artifact would be {found}, and the model's is {wanted}.", REPORT_IT
            )
    return same


def _kind(value: Any) -> str:
    """What an output is, for comparison and messages."""
    shape = getattr(value, "shape", None)
    if shape is None:
        return type(value).__name__
    return f"{value.dtype} {' x '.join(map(str, shape)) or 'scalar'}"


def _candidate(session: Session, feeds: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Run an artifact on what its model ran on."""
    try:
        return _timed(session, feeds)
    except InputError as error:
        raise InputError(f"The artifact does not run where the model does: {error.message}", REPORT_IT) from error


def _timed(session: Session, feeds: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    started = time.perf_counter()
    outputs = session.run(feeds)
    return outputs, time.perf_counter() - started
