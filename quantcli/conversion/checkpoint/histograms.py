"""What a page shows of a checkpoint's worst layers: read from both files once all is written and verified."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.checkpoint.decoded import decoded_checkpoint
from quantcli.checkpoint.quantized import is_quantized
from quantcli.core.histogram import of_weight
from quantcli.core.tensors import TensorInfo
from quantcli.reporting.report import LayerRow

if TYPE_CHECKING:
    import numpy as np

#: Elements read at a time.
_ELEMENTS = 1 << 22


def weight_histograms(source: Checkpoint, output: Path, rows: Sequence[LayerRow], most: int) -> list[dict[str, Any]]:
    """Histograms of the worst weights of an artifact, the worst first, beside those of its source."""
    artifact = open_checkpoint(output)
    decoded = decoded_checkpoint(artifact) if is_quantized(artifact) else artifact
    before, after = ({info.name: info for info in each.infos()} for each in (source, decoded))
    measured = [row for row in rows if row.sqnr_db is not None and row.name in before and row.name in after]
    found = []
    for row in sorted(measured, key=lambda row: row.sqnr_db or 0.0)[:most]:
        values = partial(_parts, source, before[row.name])
        histogram = of_weight(row.name, values, partial(_parts, decoded, after[row.name]), row.sqnr_db)
        found += [histogram.to_json()] if histogram else []
    return found


def _parts(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[np.ndarray]:
    """A weight's values, some rows at a time."""
    step = max(1, _ELEMENTS // max(1, info.columns))
    for start in range(0, info.rows, step):
        yield checkpoint.read_rows(info, start, min(start + step, info.rows)).float().numpy()
