"""What each layer of a graph costs in each way to store it: the noise that it alone leaves on the outputs."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from quantcli.search.budget import FLOAT
from quantcli.search.onnx_runs import GraphRuns
from quantcli.search.onnx_ways import Ways
from quantcli.search.sensitivity_file import SensitivityStore

#: What is kept of a layer that leaves the outputs not finite: more than all others together.
NOT_FINITE = 1e12


def layer_costs(
    runs: Callable[[], GraphRuns],
    ways: Ways,
    store: SensitivityStore,
    is_late: Callable[[], bool],
    tick: Callable[[float], None],
) -> dict[str, dict[str, float]]:
    """Noise by signal of the outputs, by layer and label of the way that it alone is stored.

    Layers whose weights lose most are measured first. What time does not reach is estimated by the weight's own error,
    times what that was found to become at the outputs; it is not kept, so that a later search measures it. ``runs`` is
    asked for only where there is something to measure.
    """
    waiting = [
        (-way.error, number, name, label)
        for number, (name, layer) in enumerate(ways.layers.items())
        for label, way in layer.ways.items()
        if label != FLOAT
    ]
    costs: dict[str, dict[str, float]] = {name: {FLOAT: 0.0} for name in ways.layers}
    ratios: list[float] = []
    late: list[tuple[str, str]] = []
    for count, (error, _, name, label) in enumerate(sorted(waiting)):
        known = store.found.costs.setdefault(name, {})
        if label not in known:
            if is_late():
                late.append((name, label))
                continue
            known[label] = min(runs().noise_of_layers({name: ways.rules[label]}), NOT_FINITE)
            store.save()
        costs[name][label] = known[label]
        if known[label] < NOT_FINITE and error < 0:
            ratios.append(known[label] / -error)
        tick((count + 1) / len(waiting))
    factor = median(ratios) if ratios else 1.0
    for name, label in late:
        costs[name][label] = factor * ways.layers[name].ways[label].error
    return costs
