"""Whether evaluation data was in the data that a model was calibrated on.

Calibrated artifacts carry a fingerprint of their calibration data: the smallest hashes of its n-grams of tokens
(Broder 1997, "On the resemblance and containment of documents"), or of its samples where they are not text. n-grams
of evaluation text whose hash lies in the same low range are a random sample of all of them, and the share of these
that the fingerprint knows estimates the share of the text that was seen. Runs of 13 are what Brown et al. 2020
("Language models are few-shot learners", appendix C) took to tell contaminated text from chance. No text can be read
from a fingerprint, and neither order nor boundaries of samples matter to it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

#: Key of a fingerprint in an artifact's manifest.
MANIFEST_KEY = "calibration_fingerprint"

#: Tokens of an n-gram.
NGRAM = 13
#: Hashes that a fingerprint keeps: 4 kB.
SKETCH_SIZE = 512
#: A smaller share is chance: two parts of a manual without a paragraph in common were found to share 0.04%.
LEAST_SHARE = 0.01
#: Fewer n-grams seen than this are chance as well, unless nearly all were.
_LEAST_SEEN, _NEARLY_ALL = 3, 0.5

_TOKENS, _ARRAYS = "tokens", "arrays"
_IDS, _MASK = "input_ids", "attention_mask"
_U64 = (1 << 64) - 1


class Sketch:
    """The smallest hashes of a stream of samples, in memory that does not grow with it."""

    def __init__(self) -> None:
        self._hashes: dict[str, np.ndarray] = {}
        self._cut: set[str] = set()

    def add(self, sample: Mapping[str, ArrayLike] | ArrayLike) -> None:
        """One sample: token ids ``[tokens]`` or ``[samples, tokens]``, or arrays by the names of inputs."""
        import numpy as np

        kind, hashes = _hashes(sample)
        known = self._hashes.get(kind, np.zeros(0, np.uint64))
        merged = np.union1d(known, hashes)
        if len(merged) > SKETCH_SIZE:
            self._cut.add(kind)
        self._hashes[kind] = merged[:SKETCH_SIZE]

    def to_json(self) -> dict[str, Any] | None:
        """The fingerprint; None where there was nothing to take one of."""
        if not self._hashes:
            return None
        # A model's samples are all of one kind; were they not, tokens tell more.
        kind = _TOKENS if _TOKENS in self._hashes else _ARRAYS
        content = self._hashes[kind].astype("<u8").tobytes()
        unit = {"ngram": NGRAM} if kind == _TOKENS else {}
        return {
            "kind": kind, **unit, "complete": kind not in self._cut, "hashes": base64.b64encode(content).decode("ascii")
        }  # fmt: skip


class Overlap:
    """Evaluation data beside a fingerprint."""

    def __init__(self, fingerprint: Mapping[str, Any]) -> None:
        """Read a fingerprint. Raises ValueError where it is none, or of a kind that this version does not know."""
        import numpy as np

        kind, ngram, complete = (fingerprint.get(key) for key in ("kind", "ngram", "complete"))
        if kind not in (_TOKENS, _ARRAYS) or (kind == _TOKENS and ngram != NGRAM) or not isinstance(complete, bool):
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

        kind, hashes = _hashes(sample)
        if kind == self._kind:
            self._met = np.union1d(self._met, hashes[hashes <= self._limit])

    @property
    def share(self) -> float:
        """Estimated share of the evaluation data, 0 to 1, that the calibration data held."""
        import numpy as np

        return float(np.isin(self._met, self._known).mean()) if len(self._met) else 0.0

    @property
    def is_leak(self) -> bool:
        """Whether the share is more than chance explains."""
        seen = round(self.share * len(self._met))
        return self.share >= LEAST_SHARE and (seen >= _LEAST_SEEN or self.share >= _NEARLY_ALL)


def fingerprint(samples: Iterable[Mapping[str, ArrayLike] | ArrayLike]) -> dict[str, Any] | None:
    """A fingerprint of calibration data, for a manifest: bounded in size, deterministic, without the data.

    Args:
        samples: token ids, each ``[tokens]`` or ``[samples, tokens]`` (a tensor ``[samples, tokens]`` is such an
            iterable), or mappings of arrays by the names of a model's inputs.
    """
    sketch = Sketch()
    for sample in samples:
        sketch.add(sample)
    return sketch.to_json()


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

    def __init__(self, manifests: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """``manifests`` are names of models and what quantcli recorded of each."""
        self._overlaps: list[tuple[str, Overlap]] = []
        self._unreadable: list[str] = []
        for name, manifest in manifests:
            found = manifest.get(MANIFEST_KEY)
            if not isinstance(found, Mapping):
                continue
            try:
                self._overlaps.append((name, Overlap(found)))
            except ValueError as error:
                self._unreadable.append(f"Whether {name} was calibrated on this data cannot be told: {error}.")

    def add(self, sample: Mapping[str, ArrayLike] | ArrayLike) -> None:
        """One sample of the evaluation data."""
        for _, found in self._overlaps:
            found.add(sample)

    def warnings(self) -> list[str]:
        """A sentence for each model that saw some of the data."""
        return self._unreadable + [
            f"About {found.share:.0%} of the evaluation data was in the calibration data of {name}: its figures "
            "flatter it. Evaluate on data that calibration did not see."
            for name, found in self._overlaps
            if found.is_leak
        ]


def _hashes(sample: Mapping[str, ArrayLike] | ArrayLike) -> tuple[str, np.ndarray]:
    """The kind of a sample and its distinct hashes, uint64."""
    import numpy as np

    arrays = {key: np.asarray(value) for key, value in sample.items()} if isinstance(sample, Mapping) else None
    ids = np.asarray(sample) if arrays is None else arrays.get(_IDS)
    if ids is None or ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        return _ARRAYS, _array_hash(arrays or {"": np.asarray(sample)})
    rows = np.atleast_2d(ids)
    mask = np.atleast_2d(arrays[_MASK]) if arrays and _MASK in arrays else np.ones_like(rows)
    kept = [row[here.astype(bool)] for row, here in zip(rows, mask, strict=True)]
    return _TOKENS, np.unique(np.concatenate([_ngram_hashes(row) for row in kept]))


def _ngram_hashes(ids: np.ndarray) -> np.ndarray:
    """Hashes of all runs of `NGRAM` ids of ``[tokens]``; of the whole where it is shorter."""
    import numpy as np

    length = min(NGRAM, len(ids))
    if not length:
        return np.zeros(0, np.uint64)
    # A multilinear hash with fixed odd factors, modulo 2^64, then mixed so that its low range is a fair sample.
    factors = _mixed(np.arange(1, NGRAM + 1, dtype=np.uint64)) | np.uint64(1)
    runs = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64) + np.uint64(1), length)
    return _mixed((runs * factors[:length]).sum(1, dtype=np.uint64) + np.uint64(length))


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014), uint64 to uint64."""
    import numpy as np

    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def _array_hash(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """One hash of a sample's arrays, whatever their names: uint64 ``[1]``."""
    import numpy as np

    parts = sorted(
        hashlib.blake2b(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).digest()
        for array in arrays.values()
    )
    digest = hashlib.blake2b(b"".join(parts), digest_size=8).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)
