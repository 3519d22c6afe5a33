"""Whether a model is evaluated on what it was calibrated or trained on."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantcli.data.fingerprint import ARRAYS, LEAST_SEEN, NEARLY_ALL, NGRAM, TOKENS, hashes

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
#: A smaller share is chance: two parts of a manual without a paragraph in common were found to share 0.04%.
LEAST_SHARE = 0.01
_U64 = (1 << 64) - 1


class Overlap:
    """Evaluation data beside a fingerprint."""

    def __init__(self, fingerprint: Mapping[str, Any]) -> None:
        """Read a fingerprint. Raises ValueError where it is none, or of a kind that this version does not know."""
        import numpy as np

        kind, ngram, complete = (fingerprint.get(key) for key in ("kind", "ngram", "complete"))
        if kind not in (TOKENS, ARRAYS) or (kind == TOKENS and ngram != NGRAM) or not isinstance(complete, bool):
            raise ValueError("its kind is unknown")
        try:
            content = base64.b64decode(fingerprint.get("hashes", ""), validate=True)
            known = np.frombuffer(content, "<u8").astype(np.uint64)
        except (binascii.Error, TypeError, ValueError) as error:
            raise ValueError("its hashes cannot be read") from error
        self._kind, self._known = str(kind), np.unique(known)
        self._limit = self._known[-1] if len(known) and not complete else np.uint64(_U64)
        self._met = np.zeros(0, np.uint64)

    def add(self, sample: Mapping[str, ArrayLike] | ArrayLike) -> None:
        """One sample of the evaluation data, as `Sketch.add` takes it."""
        import numpy as np

        kind, found = hashes(sample)
        if kind == self._kind:
            self._met = np.union1d(self._met, found[found <= self._limit])

    def merge(self, other: Overlap) -> None:
        """Evaluation data that another one has seen."""
        import numpy as np

        self._met = np.union1d(self._met, other._met)

    @property
    def share(self) -> float:
        """Estimated share of the evaluation data, 0 to 1, that the calibration data held."""
        import numpy as np

        return float(np.isin(self._met, self._known).mean()) if len(self._met) else 0.0

    @property
    def is_leak(self) -> bool:
        """Whether the share is more than chance explains."""
        seen = round(self.share * len(self._met))
        return self.share >= LEAST_SHARE and (seen >= LEAST_SEEN or self.share >= NEARLY_ALL)


def overlap(found: Mapping[str, Any], samples: Iterable[Mapping[str, ArrayLike] | ArrayLike]) -> float:
    """Estimated share, 0 to 1, of evaluation samples' text, or of the samples, that a fingerprint's data held.

    Raises:
        ValueError: it is no fingerprint.
    """
    compared = Overlap(found)
    for sample in samples:
        compared.add(sample)
    return compared.share


class LeakCheck:
    """Evaluation data beside the calibration data of every model that has a fingerprint."""

    def __init__(self, fingerprints: Sequence[tuple[str, Mapping[str, Any] | None]]) -> None:
        """``fingerprints`` are names of models and what quantcli recorded of the calibration data of each."""
        self._overlaps: list[tuple[str, Overlap]] = []
        self._unreadable: list[str] = []
        for name, found in fingerprints:
            if found is None:
                continue
            try:
                self._overlaps.append((name, Overlap(found)))
            except ValueError as error:
                self._unreadable.append(f"Whether {name} was calibrated on this data cannot be told: {error}.")

    def add(self, sample: Mapping[str, ArrayLike] | ArrayLike) -> None:
        """One sample of the evaluation data."""
        for _, found in self._overlaps:
            found.add(sample)

    def merge(self, other: LeakCheck) -> None:
        """Evaluation data that another one of the same models has seen."""
        for (_, own), (_, theirs) in zip(self._overlaps, other._overlaps, strict=True):
            own.merge(theirs)

    def warnings(self) -> list[str]:
        """A sentence for each model that saw some of the data."""
        return self._unreadable + [
            f"About {found.share:.0%} of the evaluation data was in the calibration data of {name}: its figures "
            "flatter it. Evaluate on data that calibration did not see."
            for name, found in self._overlaps
            if found.is_leak
        ]
