"""One block of a model, or a whole model in its place: observe, transform, round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from quantcli.blocks.activations import Activations
from quantcli.blocks.calls import Call
from quantcli.blocks.skeleton import Skeleton
from quantcli.checkpoint.roles import module_of
from quantcli.core.dtypes import torch_dtype
from quantcli.core.numerics import all_finite
from quantcli.core.tensors import RoundedTensor
from quantcli.errors import InputError
from quantcli.planning.plan import LayerPlan, Plan
from quantcli.ptq.folds import is_transposed
from quantcli.ptq.input_quantization import fix_input_scales
from quantcli.ptq.observe import observe
from quantcli.ptq.rounding import round_block, round_unobserved
from quantcli.ptq.transforms import Transforms
from quantcli.system import ranks
from quantcli.system.hardware import release_freed

#: Called with the fraction that is done.
Tick = Callable[[float], None]
#: Of the time a block takes, roughly what has passed once its inputs are observed, and once its codes are chosen.
_OBSERVED, ROUNDED = 0.25, 0.85


@dataclass
class BlockOutcome:
    """A finished block: what its layers became, by the names of their tensors.

    ``plain``: parameters that are not quantized, as float32 holding what their stored dtype can.
    """

    path: str
    quantized: dict[str, RoundedTensor] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)


class BlockQuantizer:
    """Chooses what the layers of a plan become, a block at a time.

    ``layers``: those that get codes and are linear modules of the model, by the module's name.
    """

    def __init__(self, skeleton: Skeleton, plan: Plan) -> None:
        self.skeleton, self.plan = skeleton, plan
        self.layers = linear_layers(skeleton, plan)
        self._by_name = {layer.info.name: layer for layer in plan.layers}
        self._transforms = Transforms(plan)

    def inside(self, path: str) -> dict[str, LayerPlan]:
        """Layers of a block by their names in it; all with the empty path, which is the model itself."""
        start = f"{path}." if path else ""
        return {name.removeprefix(start): layer for name, layer in self.layers.items() if name.startswith(start)}

    def run(
        self,
        path: str,
        block: nn.Module,
        calls: Sequence[Call],
        targets: Activations | None,
        seed: int,
        report: Tick,
    ) -> BlockOutcome:
        """Quantize one block.

        Args:
            path: its name in the model, empty for the model itself.
            block: its weights, float32; transforms change them.
            calls: its calibration inputs, one batch each; of ranks that share the work, each has its own of them.
            targets: what the original block returns for each of them, for algorithms that learn from it.
            seed: what is drawn at random is drawn by it.
            report: told the fraction that is done.

        Raises:
            InputError: what it computes is not finite, or a layer with a static range of inputs saw no token.
        """
        layers = self.inside(path)
        if targets is not None:
            _require_finite(path, (targets[number] for number in range(len(calls))))
        observed = counted(calls, part_of(report, 0.0, _OBSERVED))
        runs = ((number, len(batches)) for number, batches in ranks.runs(len(calls)))
        stats = observe(block, observed, layers, self._needs(layers), runs, path)
        release_freed()
        if self._transforms.steps:
            self._transforms.apply(block, layers, calls[0] if ranks.is_first() else None, stats)
        part = part_of(report, _OBSERVED, ROUNDED)
        rounded = round_block(block, layers, calls, targets, stats, self.plan, seed, part)
        fix_input_scales(rounded, layers, stats, torch_dtype(self.plan.scale_dtype))
        parameters, start = self.skeleton.parameters(path), f"{path}." if path else ""
        outcome = BlockOutcome(path, {layers[name].info.name: tensor for name, tensor in rounded.items()})
        for name, values in block.named_parameters():
            info = parameters.get(f"{start}{name}")
            if info is None:
                continue  # computed, not stored
            layer = self._by_name[info.name]
            if info.name in outcome.quantized or layer.dropped:
                continue
            if layer.has_codes:
                outcome.quantized[info.name] = round_unobserved(values.detach().cpu(), layer, self.plan)
            else:
                outcome.plain[info.name] = values.detach().cpu().to(torch_dtype(layer.dtype)).float()
        return outcome

    def _needs(self, layers: Mapping[str, LayerPlan]) -> frozenset[str]:
        """What is to be observed of the layers' inputs."""
        static = any(layer.scheme is not None and layer.scheme.is_static for layer in layers.values())
        return (self.plan.steps.needs | ({"absmax"} if static else set())) - {"original"}


def part_of(report: Tick, start: float, stop: float) -> Tick:
    """What reports a part of some work as the whole, which it is from ``start`` to ``stop``."""
    return lambda done: report(start + (stop - start) * done)


def counted(calls: Sequence[Call], report: Tick | None) -> Iterator[Call]:
    """This rank's calls; each one is reported as done when the next is asked for."""
    own = ranks.own_batches(len(calls))
    for done, number in enumerate(own, 1):
        yield calls[number]
        if report:
            report(done / len(own))


def linear_layers(skeleton: Skeleton, plan: Plan) -> dict[str, LayerPlan]:
    """Layers that get codes and are linear modules of the model, by the module's name."""
    quantized = {layer.info.name: layer for layer in plan.layers if layer.has_codes}
    layers = {}
    for parameter, info in skeleton.parameters().items():
        path = module_of(parameter)
        module = skeleton.module.get_submodule(path)
        layer = quantized.get(info.name)
        if layer is not None and parameter.endswith(".weight") and _is_called(module, layer):
            layers[path] = layer
    return layers


def _is_called(module: nn.Module, layer: LayerPlan) -> bool:
    """Whether a module multiplies its inputs by its weight when it is called, as the plan has it."""
    if layer.transposed:
        return is_transposed(module)
    # torch's attention reads the weight of such a layer without calling it.
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _require_finite(path: str, returned: Iterable[Tensor]) -> None:
    """Raise InputError where a block returns what nothing can be learned from."""
    if not all(map(all_finite, returned)):
        raise InputError(
            f"{path or 'The model'} returns values that are not finite: the model overflows on the calibration data.",
            hint="Check the model with quantcli eval, or calibrate with other data.",
        )
