"""What a conversion to ONNX became, told in a manifest and in a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantcli.algorithms import RANGES, where_reproducible
from quantcli.conversion.onnx.comparison import Comparison
from quantcli.conversion.onnx.rows import layer_entries, layer_rows, left_rows
from quantcli.conversion.onnx.source import Source
from quantcli.core.manifest import Manifest
from quantcli.errors import InputError
from quantcli.onnx.graph.model import open_onnx
from quantcli.onnx.plan.plan import GraphPlan, LayerOutcome
from quantcli.reporting.report import ModelRow, Report
from quantcli.system.text import format_bytes
from quantcli.version import __version__


@dataclass(frozen=True)
class Result:
    """A plan as it was, or would be, carried out; sizes in bytes.

    ``verified`` is what was proven of the artifact, ``compared`` its outputs beside the original's.
    """

    source: Source
    output: Path
    plan: GraphPlan
    outcomes: Sequence[LayerOutcome]
    verified: Mapping[str, Any] = field(default_factory=dict)
    compared: Comparison | None = None

    def manifest(self, data_fingerprint: Mapping[str, Any] | None) -> Manifest:
        """What the artifact says of itself, and of the data that it has seen."""
        return Manifest(
            quantcli=__version__,
            input_sha256=self.source.model.sha256(),
            format="onnx",
            scheme=self.plan.scheme,
            algorithm=self.plan.algorithm,
            recipe=self.plan.recipe.model_dump(mode="json"),
            source=self.source.origin or None,
            calibration_fingerprint=data_fingerprint or None,
            reproducible=where_reproducible(self._sources_of_codes()) or None,
            layers=layer_entries(self.outcomes),
            verified=dict(self.verified),
        )

    def _sources_of_codes(self) -> Iterator[str]:
        """Names of what decided on codes, scales and ranges."""
        yield from (outcome.plan.algorithm or "" for outcome in self.outcomes)
        if self.plan.of_mode("static"):
            yield RANGES

    def report(
        self,
        size: int,
        warnings: Sequence[str],
        details: dict[str, Any],
        manifest: Manifest | None = None,
        file: Path | None = None,
    ) -> Report:
        """The report of a conversion whose artifact has this size; ``file`` is where it lies now, if it is there."""
        original, plan = self.source.model, self.plan
        rows = layer_rows(self.outcomes) + left_rows(original.ir, plan, original.path)
        measured = [row.sqnr_db for row in rows if row.sqnr_db is not None]
        metrics = {"size_ratio": size / original.size_bytes, "sqnr_db_min": min(measured, default=None)}
        if self.compared is not None:
            metrics |= {"output_sqnr_db": self.compared.sqnr_db, "speed": self.compared.speed}
        path, sha256 = self.source.subject.path, original.sha256()
        models = [
            ModelRow(path, "reference", "onnx", self.source.subject.scheme, sha256, original.size_bytes),
            ModelRow(str(self.output), "candidate", "onnx", plan.scheme, None, size, metrics),
        ]
        models[-1].details["algorithm"] = plan.algorithm
        models[-1].sha256 = open_onnx(file, mapped=True).sha256() if file else None
        models[-1].manifest = manifest.to_json() if manifest else None
        return Report("convert", models, rows, [], list(dict.fromkeys(warnings)), details)


def require_smaller(size: int, before: int, weights_before: int) -> None:
    """Raise InputError where an artifact of ``size`` bytes is no smaller than its model."""
    if size >= before:
        # What the file computes of less, or holds packed, is no part of it.
        part = f": of that, {format_bytes(weights_before)} are weights" if weights_before <= before else ""
        raise InputError(
            f"The artifact would have {format_bytes(size)}, and the model has {format_bytes(before)}{part}. Nothing "
            "was written.",
            "It is too small a model for this scheme; --allow-larger keeps it, for the sake of its speed.",
        )
