"""What a page shows of the activations that eight bits fit worst."""

from __future__ import annotations

from typing import Any

from quantcli.calibration.statistics import CalibrationStats
from quantcli.core.histogram import of_activation


def activation_histograms(statistics: CalibrationStats, most: int) -> list[dict[str, Any]]:
    """Histograms of the activations that eight bits fit worst, with the ranges chosen for them, the worst first."""
    found = []
    for name in statistics.tensors:
        clipped = statistics.range(name)
        sqnr_db = statistics.sqnr_db(name, *clipped)
        found += [(sqnr_db, name, clipped)] if sqnr_db is not None else []
    entries = []
    for sqnr_db, name, clipped in sorted(found)[:most]:
        seen = statistics[name].distribution
        histogram = of_activation(name, (seen.left + seen.right) / 2, seen.counts, clipped, sqnr_db)
        entries += [histogram.to_json()] if histogram else []
    return entries
