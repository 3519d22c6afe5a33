"""What each way to store each layer of a checkpoint costs: estimated by probes, then held to measured runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.roles import module_of
from quantcli.planning.plan import LayerPlan
from quantcli.search.module import SearchedModel, stored_values
from quantcli.search.probes import Probes
from quantcli.search.sensitivity_file import SensitivityStore
from quantcli.search.ways import Ways

#: Measured over estimated cost is believed within these.
_LEAST_FACTOR, _MOST_FACTOR = 0.05, 20.0
#: Layers after which what is known is written down.
_SAVED_EVERY = 16
#: Of the time of a sensitivity, what probing and what rounding takes.
_PROBED, _ROUNDED = 0.3, 0.6


@dataclass
class Estimator:
    """Fills a store with the costs of all layers. ``model`` None: there is no data, and errors of weights decide."""

    ways: Ways
    store: SensitivityStore
    model: SearchedModel | None
    scale_dtype: str
    seed: int = 0
    tick: Callable[[float], None] = lambda _: None

    def costs(self) -> dict[str, dict[str, float]]:
        """Costs by tensor and label, from the file as far as they are there, corrected by what was measured."""
        found = self.store.found
        names = [name for group in self.ways.groups for name in group]
        missing = [name for name in names if name not in found.costs]
        if missing:
            found.measure = self.model.measure if self.model else "weight_error"
            self._estimate(missing)
        if self.model and not found.factors:
            self._correct(names)
        return {
            name: {label: cost * found.factors.get(kind_of(name), 1.0) for label, cost in found.costs[name].items()}
            for name in names
        }

    def _estimate(self, names: list[str]) -> None:
        found = self.store.found
        probes = None
        if self.model:
            probes = Probes(self.model, names, self.seed, lambda done: self.tick(_PROBED * done))
        known = set(probes.seen()) if probes else set[str]()
        relative: dict[str, dict[str, float]] = {}
        for number, name in enumerate(names):
            values = self._original(name)
            relative[name], costs = {}, {}
            for label, layer in self.ways.layer_ways(name).items():
                difference = stored_values(values, layer, self.scale_dtype) - values
                relative[name][label] = float(difference.square().sum() / values.square().sum().clamp(min=1e-30))
                if probes and name in known:
                    costs[label] = probes.cost(name, difference.reshape(layer.info.rows, -1))
            if costs:
                found.costs[name] = costs
            if number % _SAVED_EVERY == _SAVED_EVERY - 1:
                self.store.save()
            self.tick(_PROBED + (_ROUNDED - _PROBED) * (number + 1) / len(names))
        found.costs |= _of_unseen(found.costs, relative, {info.name: info.numel for info in self.ways.infos})
        self.store.save()

    def _original(self, name: str) -> Tensor:
        """A weight in float32."""
        held = self.model.values(name) if self.model else None
        return read_float(self.ways.checkpoint, name) if held is None else held

    def _correct(self, names: list[str]) -> None:
        """Measure each kind of layers as a whole, stored the cheapest way, beside the sum of its estimates."""
        assert self.model is not None
        kinds: dict[str, list[str]] = {}
        for name in names:
            kinds.setdefault(kind_of(name), []).append(name)
        for number, (kind, members) in enumerate(kinds.items()):
            values, estimated = {}, 0.0
            for name in members:
                layers = self.ways.layer_ways(name)
                costs = self.store.found.costs[name]
                if not layers or self.model.values(name) is None:
                    continue
                label = max(layers, key=lambda each: costs[each])
                values[name] = stored_values(self._original(name), layers[label], self.scale_dtype)
                estimated += costs[label]
            measured = self.model.distance(values) if values else 0.0
            factor = measured / estimated if estimated > 0 and measured > 0 else 1.0
            self.store.found.factors[kind] = min(_MOST_FACTOR, max(_LEAST_FACTOR, factor))
            self.tick(_ROUNDED + (1 - _ROUNDED) * (number + 1) / len(kinds))
        self.store.save()


def _of_unseen(
    costs: Mapping[str, Mapping[str, float]], relative: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """Layers that no probe saw cost what others cost on average at the same relative error and size."""
    seen = [
        (costs[name][label], error * sizes[name])
        for name, errors in relative.items()
        if name in costs
        for label, error in errors.items()
    ]
    noise = sum(size for _, size in seen)
    rate = sum(cost for cost, _ in seen) / noise if noise > 0 else 1 / sum(sizes[name] for name in relative)
    return {
        name: {label: rate * error * sizes[name] for label, error in errors.items()}
        for name, errors in relative.items()
        if name not in costs
    }


def kind_of(name: str) -> str:
    """A layer's kind: its name without the numbers of blocks, experts and the like."""
    return re.sub(r"\d+", "*", module_of(name) or name)


def read_float(checkpoint: Checkpoint, name: str) -> Tensor:
    """A whole tensor of a checkpoint in float32."""
    info = next(each for each in checkpoint.infos() if each.name == name)
    return checkpoint.read_rows(info, 0, info.rows).reshape(info.shape).float()


def mix_values(ways: Ways, labels: Mapping[str, str], model: SearchedModel, scale_dtype: str) -> dict[str, Tensor]:
    """What the codes of a mix stand for, by tensor; ``labels`` tells how each is stored, others stay."""
    values = {}
    for name, label in labels.items():
        layer: LayerPlan | None = ways.layer_ways(name).get(label)
        original = model.values(name)
        if layer is not None and original is not None:
            values[name] = stored_values(original, layer, scale_dtype)
    return values
