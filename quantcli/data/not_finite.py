"""Samples that hold NaN or infinity, which spoil ranges and scales, and are seldom meant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantcli.core.ports import dtype_family
from quantcli.data.sources.base import Sample

if TYPE_CHECKING:
    import numpy as np


class NotFinite:
    """Looks at each sample once, and tells which ones hold values that are not finite."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._count = 0
        self._first = ""

    def look(self, index: int, sample: Sample, source: str) -> None:
        """Note a sample of a source where it holds such values."""
        if index in self._seen:
            return
        self._seen.add(index)
        name = input_not_finite(sample.inputs)
        if name is not None:
            self._count += 1
            self._first = self._first or f"{sample.where or f'Sample {index} of {source}'}, in the input {name}"

    def warnings(self) -> list[str]:
        """A sentence where there are any."""
        if not self._count:
            return []
        one = self._count == 1
        what = "A sample holds" if one else f"{self._count} samples hold"
        return [
            f"{what} NaN or infinite values: {self._first}{'' if one else ', is the first'}. Integer layers make no "
            "numbers of them; leave such samples out, unless a mask is meant to hold them."
        ]


def input_not_finite(inputs: Mapping[str, Any]) -> str | None:
    """The name of the first input that holds a NaN or an infinity, or None."""
    import numpy as np

    def is_spoilt(values: np.ndarray) -> bool:
        return dtype_family(values.dtype) == "float" and not np.isfinite(values.astype(np.float64, copy=False)).all()

    return next((name for name, value in inputs.items() if any(map(is_spoilt, _arrays(value)))), None)


def _arrays(value: Any) -> list[np.ndarray]:
    """The tensors of an input, which may be a sequence of them."""
    import numpy as np

    return [np.asarray(each) for each in value] if isinstance(value, list) else [np.asarray(value)]
