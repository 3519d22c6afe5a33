"""What each way to store each layer of a checkpoint costs: estimated by probes, then held to measured runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from quantcli.checkpoint.roles import module_of
from quantcli.core.dtypes import torch_dtype
from quantcli.core.tensors import QuantizedTensor
from quantcli.planning.plan import Plan
from quantcli.search.module import SearchedModel, codes_of, values_of
from quantcli.search.probes import Probes
from quantcli.search.sensitivity_file import SensitivityStore
from quantcli.search.ways import Ways

#: Measured over estimated cost is believed within these.
_LEAST_FACTOR, _MOST_FACTOR = 0.05, 20.0
#: What is kept of codes of weights, in bytes.
_KEPT_BYTES = 256 << 20
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
    stored: StoredValues
    seed: int = 0
    tick: Callable[[float], None] = lambda _: None
    is_late: Callable[[], bool] = lambda: False

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
            probes = Probes(self.model, names, self.seed, lambda done: self.tick(_PROBED * done), self.is_late)
        known = set(probes.seen()) if probes else set[str]()
        relative: dict[str, dict[str, float]] = {}
        for number, name in enumerate(names):
            values = self.stored.original(name)
            relative[name], costs = {}, {}
            for label, layer in self.ways.layer_ways(name).items():
                stored = self.stored(name, label)
                assert stored is not None
                difference = stored - values
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

    def _correct(self, names: list[str]) -> None:
        """Measure each kind of layers as a whole, stored the cheapest way, beside the sum of its estimates."""
        assert self.model is not None
        kinds: dict[str, list[str]] = {}
        for name in names:
            kinds.setdefault(kind_of(name), []).append(name)
        for number, (kind, members) in enumerate(kinds.items()):
            if self.is_late():
                return  # what was not measured is believed as it was estimated, and measured another time
            values, estimated = {}, 0.0
            for name in members:
                if self.model.values(name) is None:
                    continue
                costs = self.store.found.costs[name]
                label = max(costs, key=costs.__getitem__)
                stored = self.stored(name, label)
                assert stored is not None
                values[name] = stored
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


class StoredValues:
    """What codes of a model's weights stand for; codes are made once for each weight and way, while there is room."""

    def __init__(self, ways: Ways, model: SearchedModel | None, plan: Plan) -> None:
        """``plan`` is of any mix: it tells what scales, and what is not chosen for, are stored as."""
        self._ways, self._model, self._scale_dtype = ways, model, plan.scale_dtype
        self._infos = {info.name: info for info in ways.infos}
        free = {name for group in ways.groups for name in group}
        self._left = [each for each in plan.layers if each.info.name not in free and each.dtype != each.info.dtype]
        self._dtype = torch_dtype(plan.dtype)
        self._kept: dict[tuple[str, str], QuantizedTensor] = {}
        self._room = _KEPT_BYTES

    def original(self, name: str) -> Tensor:
        """A weight in float32, of its own shape."""
        held = self._model.values(name) if self._model else None
        if held is not None:
            return held
        info = self._infos[name]
        return self._ways.checkpoint.read_rows(info, 0, info.rows).reshape(info.shape).float()

    def __call__(self, name: str, label: str) -> Tensor | None:
        """A weight stored in one way, float32 of its own shape; None where it stays as it is."""
        layer = self._ways.layer_ways(name).get(label)
        if layer is None:
            return None
        codes = self._kept.get((name, label)) or codes_of(self.original(name), layer, self._scale_dtype)
        if (name, label) not in self._kept and (nbytes := codes.codes.nbytes + codes.scale.nbytes) <= self._room:
            self._kept[name, label] = codes
            self._room -= nbytes
        return values_of(codes, layer)

    def of_mix(self, labels: Mapping[str, str]) -> dict[str, Tensor]:
        """All tensors that a mix changes, by name; ``labels`` tells how each that is chosen for is stored."""
        found = {}
        for name, label in labels.items():
            values = self(name, label)
            found[name] = self.original(name).to(self._dtype).float() if values is None else values
        for layer in self._left:
            if layer.info.is_float and not layer.has_codes and not layer.dropped:
                found[layer.info.name] = self.original(layer.info.name).to(torch_dtype(layer.dtype)).float()
        return found
