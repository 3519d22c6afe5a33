"""Scales that move difficulty between a block's layers: chosen by an algorithm, folded where the structure allows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from quantcli import algorithms
from quantcli.algorithms.base import LinearStats, Readers
from quantcli.blocks.calls import Call
from quantcli.core.dtypes import torch_dtype
from quantcli.core.scheme import Scheme
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.planning.steps import Step
from quantcli.ptq.folds import Fold, apply_fold, find_folds, holds, matrix
from quantcli.system import ranks


class Transforms:
    """The transforms of a plan, block after block."""

    def __init__(self, plan: Plan) -> None:
        self.steps = plan.steps.transforms
        self._scale_dtype = torch_dtype(plan.scale_dtype)
        self._by_structure: dict[str, list[Fold]] = {}

    def apply(
        self, block: nn.Module, layers: Mapping[str, LayerPlan], call: Call | None, stats: Mapping[str, LinearStats]
    ) -> None:
        """Change a block's weights, and the statistics with them; what it computes stays the same.

        Args:
            block: one transformer layer, in float32.
            layers: its layers that get codes, by their names in it.
            call: one batch of its inputs; None on ranks that the first one tells what it found.
            stats: what was observed of the layers' inputs.
        """
        # What is found by trial, or searched for, is so once: on another processor, last bits may be others.
        folds = ranks.first(lambda: self._folds(block, layers, call))
        for step in self.steps:
            for fold in folds:
                self._fold(step, block, fold, layers, stats)

    def _folds(self, block: nn.Module, layers: Mapping[str, LayerPlan], call: Call | None) -> list[Fold]:
        assert call is not None
        # A trial runs the block some twenty times, and blocks that are built alike mostly are folded alike.
        key = f"{block} {sorted(layers)}"
        if key not in self._by_structure:
            self._by_structure[key] = find_folds(block, call, layers)
        elif not holds(block, call, self._by_structure[key]):
            return find_folds(block, call, layers)
        return self._by_structure[key]

    def _fold(
        self,
        step: Step,
        block: nn.Module,
        fold: Fold,
        layers: Mapping[str, LayerPlan],
        stats: Mapping[str, LinearStats],
    ) -> None:
        targets = [target for target in fold.targets if target in layers]
        observed = stats[targets[0]]
        # Two readers of one channel that are not given one tensor have no statistics in common.
        if not observed.tokens or any(stats[target] is not observed for target in targets):
            return
        weights = [matrix(block.get_submodule(target)).detach().contiguous() for target in targets]
        schemes = [_scheme(layers[target]) for target in targets]
        readers = Readers(observed, weights, schemes, self._scale_dtype, partial(_tied, fold))
        scale = ranks.first(lambda: algorithms.transform(step.name).input_scale(readers, step.options))
        if bool((scale == 1).all()):
            return
        apply_fold(block, fold, fold.largest(scale))
        observed.divide(scale)


def _scheme(layer: LayerPlan) -> Scheme:
    assert layer.scheme is not None
    return layer.scheme


def _tied(fold: Fold, values: Tensor, *, mean: bool) -> Tensor:
    """One value for all inputs that come from one channel of the source, float32 ``[inputs of a target]``."""
    return fold.expand(fold.mean(values) if mean else fold.largest(values))
