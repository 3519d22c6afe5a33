"""What quantized inputs do to a block while it is quantized: the blocks after it have to see that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.algorithms.base import LinearStats
from quantcli.algorithms.smoothquant import fake_quantized_inputs
from quantcli.core.numerics import choose_qparams
from quantcli.core.scheme import NumberFormat
from quantcli.core.tensors import QuantizedTensor, RoundedTensor
from quantcli.errors import InputError
from quantcli.planning.plan import LayerPlan

#: A symmetric int8 scale times this is the largest magnitude that it covers.
_REACH = 127.5


def fix_input_scales(
    rounded: Mapping[str, RoundedTensor],
    layers: Mapping[str, LayerPlan],
    stats: Mapping[str, LinearStats],
    dtype: torch.dtype,
) -> None:
    """Give layers with fixed input ranges the scale of all that was observed, stored as ``dtype``; by layer.

    Raises InputError where a layer saw no token, so that there is no range.
    """
    for name, layer in layers.items():
        if layer.scheme is None or layer.scheme.inputs is None or not layer.scheme.is_static:
            continue
        absmax = stats[name].absmax
        if absmax is None or not stats[name].tokens:
            raise InputError(
                f"{layer.info.name} saw no token of the calibration data, so the range of its inputs is not known.",
                hint="Use more data, --scheme int8-dynamic, or --skip the layer.",
            )
        rounded[name].tensor.input_scale = choose_qparams(None, absmax.amax(), layer.scheme.inputs, dtype)[0].cpu()


@contextmanager
def quantized_inputs(
    block: nn.Module, layers: Mapping[str, LayerPlan], quantized: Mapping[str, QuantizedTensor]
) -> Iterator[None]:
    """Meanwhile the layers of a block quantize their inputs where their scheme says so.

    ``layers`` are named as in the block, ``quantized`` holds their codes (and static scales of their inputs) by tensor.
    The rounding has slope one for gradients (straight-through).
    """
    with ExitStack() as stack:
        for name, layer in layers.items():
            if layer.scheme is not None and layer.scheme.inputs is not None:
                static = quantized[layer.info.name].input_scale
                hook = partial(_quantize, layer.scheme.inputs, static)
                stack.callback(block.get_submodule(name).register_forward_pre_hook(hook).remove)
        yield


def _quantize(
    number_format: NumberFormat, static: Tensor | None, module: nn.Module, args: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    inputs = args[0]
    with torch.no_grad():
        absmax = inputs.abs().amax() if static is None else static.to(inputs.device) * _REACH
        rounded = fake_quantized_inputs(inputs.reshape(-1, inputs.shape[-1]), number_format, absmax)
        rounded = rounded.reshape(inputs.shape)
    if inputs.requires_grad:
        rounded = inputs + (rounded - inputs).detach()
    return (rounded, *args[1:])
