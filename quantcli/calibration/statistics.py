"""What calibration learned of a model's tensors, with its provenance: `CalibrationStats`, and its STATS file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.calibration.observers import TensorStats
from quantcli.calibration.statistics_file import Provenance, read, write
from quantcli.data.made_up import Draw
from quantcli.errors import InputError
from quantcli.system import ranks
from quantcli.system.parallel import in_parallel, usable_cores

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class CalibrationStats:
    """The statistics of a model's tensors on some data, and where they come from."""

    provenance: Provenance
    tensors: Mapping[str, TensorStats]
    _ranges: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict, repr=False)

    @property
    def method(self) -> str:
        """How ranges are chosen: a name of `quantcli.calibration.ranges.METHODS`."""
        return self.provenance.method

    @property
    def samples(self) -> int:
        """Number of samples seen."""
        return self.provenance.samples

    @property
    def seed(self) -> int:
        """What samples were chosen by."""
        return self.provenance.seed

    @property
    def model_sha256(self) -> str:
        """Hash of the model that the statistics belong to."""
        return self.provenance.model_sha256

    @property
    def data_sha256(self) -> str:
        """Hash of the samples."""
        return self.provenance.data_sha256

    def __getitem__(self, name: str) -> TensorStats:
        """One tensor's statistics. Raises InputError where there are none."""
        if name not in self.tensors:
            raise InputError(f"The calibration statistics hold nothing about {name}.", "Run quantcli calibrate anew.")
        return self.tensors[name]

    def range(self, name: str, method: str | None = None) -> tuple[float, float]:
        """Low and high of a tensor, by ``method`` or the one chosen at calibration; zero lies between them.

        Both are zero where a tensor was zero everywhere, empty, or never finite. Raises InputError for a tensor
        that was not observed.
        """
        key = name, method or self.method
        if key not in self._ranges:
            self._ranges[key] = self[name].range(key[1])
        return self._ranges[key]

    def find_ranges(self) -> None:
        """Choose the range of every tensor by the statistics' method at once, on all cores of all ranks."""
        # Methods look at each bin once for every range that they try.
        mine = ranks.share({name: len(tensor.counts) for name, tensor in self.tensors.items()})
        found: dict[tuple[str, str], tuple[float, float]] = {}

        def find(name: str) -> None:
            found[name, self.method] = self.tensors[name].range(self.method)

        in_parallel((partial(find, name) for name in mine), usable_cores())
        for part in ranks.gather(found):
            self._ranges.update(part)

    def sqnr_db(self, name: str, low: float, high: float, levels: int = 256) -> float | None:
        """Expected signal-to-noise ratio of a tensor on an asymmetric grid with ``levels`` values.

        None without signal or without noise. Raises InputError for a tensor that was not observed.
        """
        return self[name].sqnr_db(low, high, levels)

    def channel_levels(self, name: str, low: float, high: float) -> float | None:
        """How many of 256 levels over a range the median channel spans; None where channels cannot be told."""
        return self[name].channel_levels(low, high)

    def channel_mean(self, name: str) -> np.ndarray | None:
        """Mean of each channel of a tensor, float32 ``[channels]``; None where channels cannot be told."""
        return self[name].channel_mean

    def draws(self) -> dict[str, Draw]:
        """What makes up values like those seen, by tensor; of tensors that were never finite none."""
        return {name: stats.distribution.draw for name, stats in self.tensors.items() if len(stats.bins)}

    def warnings(self, names: Collection[str] | None = None) -> list[str]:
        """A sentence for each tensor (of ``names``) with values that quantization cannot mean well."""
        return [
            f"{name} {problem}."
            for name, stats in self.tensors.items()
            if names is None or name in names
            for problem in stats.problems()
        ]

    def require_model(self, sha256: str) -> None:
        """Raise InputError where these are another model's statistics."""
        if sha256 != self.model_sha256:
            raise InputError(
                f"The calibration statistics belong to another model: its hash is {self.model_sha256[:16]}..., this "
                f"model's is {sha256[:16]}....",
                "Run quantcli calibrate with this model.",
            )

    def save(self, path: Path) -> None:
        """Write the STATS file: whole or not at all, and equal bytes for equal statistics.

        Raises:
            InputError: it cannot be written.
        """
        write(path, self.provenance, self.tensors)

    @staticmethod
    def load(path: Path) -> CalibrationStats:
        """Read a STATS file.

        Raises:
            InputError: it is missing, damaged, or something else.
        """
        return CalibrationStats(*read(path))
