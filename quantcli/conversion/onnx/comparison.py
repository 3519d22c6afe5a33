"""An artifact's outputs beside those of its model, on the same samples."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from quantcli.data.samples import Sample
from quantcli.errors import InputError
from quantcli.models.session import Session

#: Samples that the artifact and its source both run at the end.
COMPARED_SAMPLES = 8

#: An artifact this much slower than its model is worth a word.
_SLOW = 0.8


@dataclass(frozen=True)
class Comparison:
    """Two models on the same samples: signal to noise of all float outputs together, and how long they took.

    ``speed``: the reference's median time over the candidate's. A hint only, since nothing was warmed up or
    repeated; None for a single sample.
    """

    samples: int
    sqnr_db: float | None
    speed: float | None

    @property
    def warnings(self) -> list[str]:
        """A word where the candidate is slow."""
        if self.speed is None or self.speed >= _SLOW:
            return []
        return [
            f"On these samples the artifact ran {self.speed:.2g} times as fast as the model; quantcli bench "
            "measures that properly."
        ]

    def to_json(self) -> dict[str, Any]:
        """For a manifest. How long it took goes into the report alone: an artifact holds no times."""
        return {"samples": self.samples, "sqnr_db": self.sqnr_db}


class OutputComparison:
    """Candidates against one reference on the first samples.

    The reference runs once; its outputs are kept in a folder, since those of a language model may not fit in memory.
    """

    def __init__(self, reference: Path, samples: Iterable[Sample], most: int, folder: Path) -> None:
        self.reference, self.samples, self.most, self.folder = reference, samples, most, folder
        self._kept: list[list[str]] = []

    def against(self, candidate: Path) -> Comparison:
        """Run a candidate; the first one in turn with the reference, so that ``speed`` is known of that one alone.

        Raises:
            InputError: a model does not run, or the candidate's outputs are not finite where the reference's are.
        """
        import numpy as np

        from quantcli.core.numerics import decibels

        session = Session(candidate)
        reference = None if self._kept else Session(self.reference)
        signal = noise = 0.0
        times: list[tuple[float, float]] = []
        samples = 0
        for number, sample in enumerate(islice(self.samples, self.most)):
            samples += 1
            if reference is None:
                expected, got = self._load(number), session.run(sample.inputs)
            else:
                (outputs, ours), (got, theirs) = (_timed(each, sample) for each in (reference, session))
                expected = self._keep(outputs)
                times.append((ours, theirs))
            for name, values in expected.items():
                wide, other = values.astype(np.float64), got[name].astype(np.float64)
                finite = np.isfinite(wide)
                if not np.isfinite(other[finite]).all():
                    raise InputError(f"The output {name} of the artifact is not finite where the original's is.")
                signal += float(np.square(wide[finite]).sum())
                noise += float(np.square(wide[finite] - other[finite]).sum())
        # The first run of a session also prepares its memory.
        later = times[1:]
        speed = median(ours for ours, _ in later) / median(theirs for _, theirs in later) if later else None
        return Comparison(samples, decibels(signal, noise), speed)

    def _keep(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """Set the floating-point outputs of the next sample aside, and return them."""
        import numpy as np

        floats = {name: values for name, values in outputs.items() if np.issubdtype(values.dtype, np.floating)}
        np.savez(self._file(len(self._kept)), *floats.values())
        self._kept.append(list(floats))
        return floats

    def _load(self, number: int) -> dict[str, Any]:
        import numpy as np

        with np.load(self._file(number)) as arrays:
            return dict(zip(self._kept[number], (arrays[key] for key in arrays.files), strict=True))

    def _file(self, number: int) -> Path:
        return self.folder / f"expected_{number}.npz"


def _timed(session: Session, sample: Sample) -> tuple[dict[str, Any], float]:
    started = time.perf_counter()
    outputs = session.run(sample.inputs)
    return outputs, time.perf_counter() - started
