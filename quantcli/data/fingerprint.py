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
import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

#: Tokens of an n-gram.
NGRAM = 13
#: Hashes that a fingerprint keeps: 4 kB.
SKETCH_SIZE = 512
#: Fewer n-grams seen than this are chance as well, unless nearly all were.
LEAST_SEEN, NEARLY_ALL = 3, 0.5

TOKENS, ARRAYS = "tokens", "arrays"
_IDS, _MASK = "input_ids", "attention_mask"


class Sketch:
    """The smallest hashes of a stream of samples, in memory that does not grow with it."""

    def __init__(self) -> None:
        self.hashes: dict[str, np.ndarray] = {}
        self._cut: set[str] = set()

    def add(self, sample: Mapping[str, ArrayLike] | ArrayLike) -> None:
        """One sample: token ids ``[tokens]`` or ``[samples, tokens]``, or arrays by the names of inputs."""
        self._take(*hashes(sample))

    def merge(self, other: Sketch) -> None:
        """What another one has seen."""
        for kind, found in other.hashes.items():
            self._take(kind, found)
        self._cut |= other._cut

    def _take(self, kind: str, found: np.ndarray) -> None:
        import numpy as np

        known = self.hashes.get(kind, np.zeros(0, np.uint64))
        merged = np.union1d(known, found)
        if len(merged) > SKETCH_SIZE:
            self._cut.add(kind)
        self.hashes[kind] = merged[:SKETCH_SIZE]

    def to_json(self) -> dict[str, Any] | None:
        """The fingerprint; None where there was nothing to take one of."""
        if not self.hashes:
            return None
        # A model's samples are all of one kind; were they not, tokens tell more.
        kind = TOKENS if TOKENS in self.hashes else ARRAYS
        content = self.hashes[kind].astype("<u8").tobytes()
        unit = {"ngram": NGRAM} if kind == TOKENS else {}
        return {
            "kind": kind, **unit, "complete": kind not in self._cut, "hashes": base64.b64encode(content).decode("ascii")
        }  # fmt: skip


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


def content(array: np.ndarray) -> bytes:
    """The bytes of an array's values; those of text are not where its objects lie."""
    return (array.astype(str) if array.dtype.kind == "O" else array).tobytes()


def hashes(sample: Mapping[str, ArrayLike] | ArrayLike) -> tuple[str, np.ndarray]:
    """The kind of a sample and its distinct hashes, uint64."""
    import numpy as np

    arrays = {key: np.asarray(value) for key, value in sample.items()} if isinstance(sample, Mapping) else None
    ids = np.asarray(sample) if arrays is None else arrays.get(_IDS)
    if ids is None or ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        return ARRAYS, _array_hash(arrays or {"": np.asarray(sample)})
    rows = np.atleast_2d(ids)
    mask = np.atleast_2d(arrays[_MASK]) if arrays and _MASK in arrays else np.ones_like(rows)
    kept = [row[here.astype(bool)] for row, here in zip(rows, mask, strict=True)]
    return TOKENS, np.unique(np.concatenate([_ngram_hashes(row) for row in kept]))


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
        hashlib.blake2b(f"{array.dtype} {array.shape} ".encode() + content(array)).digest() for array in arrays.values()
    )
    digest = hashlib.blake2b(b"".join(parts), digest_size=8).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)
