"""An artifact's outputs beside those of its model, on the same inputs: of the data, or made up where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from quantcli.conversion.onnx.trial_inputs import Feeds, has_numbers, is_flat
from quantcli.core.ports import dtype_family, tensors_of
from quantcli.data.not_finite import input_not_finite
from quantcli.errors import InputError
from quantcli.models.narrow import in_numpy
from quantcli.models.pieces import Runnable, pieces_of, runnable
from quantcli.models.session import session_of

if TYPE_CHECKING:
    import numpy as np

#: Samples that the artifact and its source both run at the end.
COMPARED_SAMPLES = 8

#: Of infinite outputs, the part that must be infinite in the artifact, too.
_INFINITE_ALIKE = 0.5

#: Integers that keep this much of their signal are measured by it, and need not be the same.
_NEAR_DB = 20.0

#: An artifact this much slower than its model is worth a word.
_SLOW = 0.8

REPORT_IT = "Nothing was written. Leave layers out with --skip, or choose another scheme; and please report it."


@dataclass(frozen=True)
class Comparison:
    """Two models on the same inputs.

    - ``sqnr_db``: signal to noise of all float outputs together; None where they are equal, or there are none.
    - ``equal``: of the values of all other outputs, the part that is the same; None where there are none.
    - ``speed``: the reference's median time over the candidate's. A hint only, since nothing was warmed up or
      repeated; None for a single sample, and for models that are run in pieces.
    - ``outputs``: signal to noise of each float output.
    - ``same``: of each other output, the part of its values that are the same; all where it is numbers, as of an image,
      that are near the reference's.
    - ``not_finite``: outputs for which the reference returned no finite number.
    - ``flat``: outputs of many numbers, but hardly two different ones.
    - ``made_up``: whether the inputs were.
    """

    samples: int
    sqnr_db: float | None
    equal: float | None = None
    speed: float | None = None
    outputs: Mapping[str, float | None] = field(default_factory=dict)
    same: Mapping[str, float] = field(default_factory=dict)
    not_finite: Sequence[str] = ()
    flat: Sequence[str] = ()
    made_up: bool = False

    @property
    def warnings(self) -> list[str]:
        """A word where the candidate is slow, and where there was nothing to compare."""
        found = [
            f"The output {name} was not compared: the model returns no finite number in it for these inputs."
            for name in self.not_finite
        ]
        if self.made_up:
            found += [
                f"Made-up inputs leave the output {name} all but constant, as where a model finds nothing: the "
                "comparison says little of it. quantcli eval with real data tells more."
                for name in self.flat
            ]
        if self.speed is not None and self.speed < _SLOW and not self.made_up:
            found.append(
                f"On these samples the artifact ran {self.speed:.2g} times as fast as the model; quantcli bench "
                "measures that properly."
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """For a manifest. How long it took goes into the report alone: an artifact holds no times."""
        found: dict[str, Any] = {"samples": self.samples, "sqnr_db": self.sqnr_db}
        return found if self.equal is None else found | {"equal": round(self.equal, 6)}


def reference_of(path: Path, name: str) -> Runnable:
    """A model that others are compared with; in pieces, which are not timed, its weights are not laid out anew."""
    return pieces_of(path, name=name, prepack=False) or session_of(path, name=name)


class OutputComparison:
    """Candidates against one reference on the same feeds.

    The reference runs once, and is gone before a candidate is loaded, so that never two models are in memory; its
    outputs are kept in a folder, since those of a language model may not fit there. ``name`` is what errors call it.
    ``loose``: an output may have another shape, where shapes follow from values; it is not compared then.
    ``notes`` tells what there is to be said of the samples that were read.
    """

    def __init__(
        self,
        reference: Path,
        feeds: Feeds,
        folder: Path,
        *,
        name: str | None = None,
        made_up: bool = False,
        loose: bool = False,
        notes: Callable[[], Sequence[str]] = list,
    ) -> None:
        self.reference, self.feeds, self.folder, self.made_up, self.loose = reference, feeds, folder, made_up, loose
        self.notes = notes
        self.name = name or str(reference)
        self._kept: list[list[str]] = []
        self._ports: dict[str, list[str]] | None = None
        self._times: list[float | None] = []
        self._samples = 0
        self._has_numbers = False

    def observe(self, reference: Runnable | None = None) -> None:
        """Run the reference, by a session of it where there is one already."""
        session = reference or reference_of(self.reference, self.name)
        self._ports = _ports(session)
        for outputs, seconds in session.runs(self._given()):
            self._times.append(seconds)
            self._keep(outputs)
            self._has_numbers = self._has_numbers or has_numbers(outputs)

    def against(self, candidate: Path, name: str | None = None, *, literal: bool = False) -> Comparison:
        """Run a candidate; the first one right after the reference, so that ``speed`` is known of that one alone.

        ``name`` is what errors call it. ``literal`` runs it as it is written, without kernels that the runtime would
        put in the place of its operators.

        Raises:
            InputError: a model does not run, the reference returns nothing that could be compared, the candidate's
                outputs are others than the reference's, or they are not finite where the reference's are.
        """
        if self._ports is None:
            self.observe()
        assert self._ports is not None
        session = runnable(candidate, optimize=not literal, name=name)
        _require_ports(self._ports, _ports(session))
        losses: dict[str, _Loss] = {}
        ours, self._times = self._times, []
        theirs: list[float | None] = []
        spoilt: list[bool] = []
        for number, (got, seconds) in enumerate(_candidate(session, self._given(spoilt))):
            theirs.append(seconds)
            expected, found = self._load(number), _tensors(got)
            notes = self.notes() if spoilt[number] else ()
            for key in _same_kinds(expected, found, loose=self.loose):
                losses.setdefault(key, _Loss()).add(key, expected[key], found[key], notes)
        if not self._has_numbers:
            raise InputError(
                f"The model returns no finite number for {self._samples} samples: nothing shows what its artifact "
                "computes.",
                "Give --data for which it returns numbers.",
            )
        return _summary(self._samples, losses, list(zip(ours, theirs, strict=False)), made_up=self.made_up)

    def repeats(self) -> bool:
        """Whether the reference returns the same when it is run again; random numbers are others in each run."""
        import numpy as np

        session = reference_of(self.reference, self.name)
        feeds, _ = next(iter(self.feeds()))
        again, before = _tensors(session.run(feeds)), self._load(0)
        return again.keys() == before.keys() and all(
            values.shape == again[key].shape
            and (np.allclose(values, again[key], equal_nan=True) if _is_float(values) else (values == again[key]).all())
            for key, values in before.items()
        )

    def _given(self, spoilt: list[bool] | None = None) -> Iterator[Mapping[str, Any]]:
        """The inputs, one after the other; to ``spoilt`` goes whether any of each is not finite.

        Without that they are counted.
        """
        for feeds, count in self.feeds():
            if spoilt is None:
                self._samples += count
            else:
                spoilt.append(input_not_finite(feeds) is not None)
            yield feeds

    def _keep(self, outputs: Mapping[str, Any]) -> None:
        """Set the outputs of the next sample aside."""
        import numpy as np

        tensors = _tensors(outputs)
        np.savez(self._file(len(self._kept)), *tensors.values())
        self._kept.append(list(tensors))

    def _load(self, number: int) -> dict[str, np.ndarray]:
        import numpy as np

        with np.load(self._file(number)) as arrays:
            return dict(zip(self._kept[number], (arrays[key] for key in arrays.files), strict=True))

    def _file(self, number: int) -> Path:
        return self.folder / f"expected_{number}.npz"


class _Loss:
    """What an output lost, over all samples."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.finite = self.same = self.values = 0
        self.is_float, self.is_flat = False, True

    def add(self, name: str, expected: np.ndarray, got: np.ndarray, notes: Sequence[str]) -> None:
        """Count another sample; where its inputs are not finite, ``notes`` tells of that.

        Raises:
            InputError: what was found is not finite where the reference is, or mostly finite where that is infinite.
        """
        import numpy as np

        self.values += expected.size
        self.is_float = _is_float(expected)
        if not self.is_float:
            self.same += int((expected == got).sum())
            if expected.dtype.kind in "iu":
                self._weigh(expected.astype(np.float64), got.astype(np.float64))
            return
        wide, other = expected.astype(np.float64), got.astype(np.float64)
        finite, infinite = np.isfinite(wide), np.isinf(wide)
        if not np.isfinite(other[finite]).all():
            raise _not_finite_alike(f"The output {name} of the artifact is not finite where the original's is.", notes)
        # A large number may overflow in one and just not in the other.
        if infinite.any() and np.mean(wide[infinite] == other[infinite]) < _INFINITE_ALIKE:
            raise _not_finite_alike(f"The output {name} of the artifact is finite where the original's is not.", notes)
        self.finite += int(finite.sum())
        self.is_flat = self.is_flat and is_flat(wide)
        self._weigh(wide[finite], other[finite])

    def _weigh(self, expected: np.ndarray, got: np.ndarray) -> None:
        import numpy as np

        with np.errstate(over="ignore"):
            self.signal += float(np.square(expected).sum())
            self.noise += float(np.square(expected - got).sum())

    @property
    def part_same(self) -> float:
        """Of values that are no floats, the part that are the same; all where they are numbers, and near."""
        db = self.db
        return 1.0 if self.signal > 0 and (db is None or db >= _NEAR_DB) else self.same / self.values

    @property
    def db(self) -> float | None:
        """Signal to noise; None: the same, minus infinity: noise where there is no signal."""
        from quantcli.core.numerics import decibels

        return float("-inf") if self.noise > 0 and not self.signal > 0 else decibels(self.signal, self.noise)


def _not_finite_alike(problem: str, notes: Sequence[str]) -> InputError:
    """What is wrong with an output; ``notes`` tells of inputs that are not finite themselves."""
    if notes:
        return InputError(f"{problem} {' '.join(notes)}", "Or choose a scheme of weights alone, such as int8 or fp16.")
    return InputError(problem, REPORT_IT)


def _summary(
    samples: int, losses: Mapping[str, _Loss], times: Sequence[tuple[float | None, float | None]], *, made_up: bool
) -> Comparison:
    from quantcli.core.numerics import decibels

    floats = {key: loss for key, loss in losses.items() if loss.is_float}
    others = {key: loss for key, loss in losses.items() if not loss.is_float and loss.values}
    # The first run of a session also prepares its memory; in pieces, all load weights.
    later = [(ours, theirs) for ours, theirs in times[1:] if ours is not None and theirs is not None]
    return Comparison(
        samples,
        decibels(sum(loss.signal for loss in floats.values()), sum(loss.noise for loss in floats.values())),
        sum(loss.same for loss in others.values()) / sum(loss.values for loss in others.values()) if others else None,
        median(ours for ours, _ in later) / median(theirs for _, theirs in later) if later else None,
        {key: loss.db for key, loss in floats.items()},
        {key: loss.part_same for key, loss in others.items()},
        [key for key, loss in floats.items() if not loss.finite],
        [key for key, loss in floats.items() if loss.finite and loss.is_flat],
        made_up,
    )


def _tensors(outputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Outputs as tensors that numpy can keep in a file; those within a sequence or map have a number in their name."""
    import numpy as np

    found = {}
    for name, value in outputs.items():
        for number, tensor in enumerate(tensors_of(value)):
            key = name if isinstance(value, np.ndarray) else f"{name}[{number}]"
            found[key] = _plain(tensor)
    return found


def _plain(values: np.ndarray) -> np.ndarray:
    import numpy as np

    if values.dtype.kind == "c":
        return np.stack([values.real, values.imag], -1)
    return in_numpy(values)


def _is_float(values: np.ndarray) -> bool:
    return dtype_family(values.dtype) == "float"


def _ports(session: Runnable) -> dict[str, list[str]]:
    """Names and types of a model's inputs, and of its outputs."""
    sides = {"inputs": session.inputs, "outputs": session.outputs}
    return {what: [f"{port.name} ({port.kind or port.dtype})" for port in ports] for what, ports in sides.items()}


def _require_ports(reference: Mapping[str, list[str]], candidate: Mapping[str, list[str]]) -> None:
    """Raise InputError where inputs or outputs have other names, another order or other types."""
    for what, before in reference.items():
        after = candidate[what]
        if before != after:
            raise InputError(
                f"The artifact's {what} would be {', '.join(after) or 'none'}; those of the model are "
                f"{', '.join(before) or 'none'}.",
                REPORT_IT,
            )


def _same_kinds(expected: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray], *, loose: bool) -> list[str]:
    """Names of outputs of the same type and shape as the reference's.

    Raises:
        InputError: one is of another type, or has another shape and ``loose`` does not allow for it.
    """
    same = []
    for key in dict.fromkeys((*expected, *got)):
        wanted, found = (_kind(each[key]) if key in each else "nothing" for each in (expected, got))
        if wanted == found:
            same.append(key)
        elif not loose or not _may_follow_values(expected.get(key), got.get(key)):
            raise InputError(
                f"The output {key} of the artifact would be {found}, and the model's is {wanted}.", REPORT_IT
            )
    return same


def _may_follow_values(expected: np.ndarray | None, got: np.ndarray | None) -> bool:
    """Whether two outputs differ in lengths alone; a sequence may have another length, too."""
    return expected is None or got is None or (expected.dtype == got.dtype and expected.ndim == got.ndim)


def _kind(value: np.ndarray) -> str:
    """What an output is, for comparison and messages."""
    name = "string" if value.dtype.kind == "U" else str(value.dtype)
    return f"{name} {' x '.join(map(str, value.shape)) or 'scalar'}"


def _candidate(session: Runnable, feeds: Iterator[Mapping[str, Any]]) -> Iterator[tuple[dict[str, Any], float | None]]:
    """Run an artifact on what its model ran on. Errors in reading the data are none of the artifact."""
    of_data: list[InputError] = []

    def given() -> Iterator[Mapping[str, Any]]:
        try:
            yield from feeds
        except InputError as error:
            of_data.append(error)
            raise

    try:
        yield from session.runs(given())
    except InputError as error:
        if error in of_data:
            raise
        raise InputError(f"The artifact does not run where the model does: {error.message}", REPORT_IT) from error
