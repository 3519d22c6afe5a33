"""Operands of several dtypes raise an error on the meta device where the processor's kernels would not take them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, layer_norm, linear

from quantcli.conversion.checkpoint.loader_dtypes import _compared_dtypes, _MixedError

WIDE, NARROW = torch.float32, torch.bfloat16


def of(dtype: torch.dtype, *shape: int, device: str) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def norm(given: torch.dtype, weight: torch.dtype, device: str) -> Tensor:
    return layer_norm(of(given, 4, 8, device=device), [8], of(weight, 8, device=device), of(weight, 8, device=device))


def product(given: torch.dtype, weight: torch.dtype, device: str) -> Tensor:
    return linear(of(given, 4, 8, device=device), of(weight, 6, 8, device=device))


def batched(given: torch.dtype, weight: torch.dtype, device: str) -> Tensor:
    return torch.bmm(of(given, 2, 4, 8, device=device), of(weight, 2, 8, 6, device=device))


def convolution(given: torch.dtype, weight: torch.dtype, device: str) -> Tensor:
    return conv1d(of(given, 1, 8, 16, device=device), of(weight, 6, 8, 3, device=device))


@pytest.mark.parametrize("operation", [norm, product, batched, convolution])
@pytest.mark.parametrize("given", [WIDE, NARROW], ids=str)
@pytest.mark.parametrize("weight", [WIDE, NARROW], ids=str)
def test_it_fails_where_the_processor_does(
    operation: Callable[[torch.dtype, torch.dtype, str], Tensor], given: torch.dtype, weight: torch.dtype
) -> None:
    fails = False
    try:
        operation(given, weight, "cpu")
    except RuntimeError:
        fails = True
    told = pytest.raises(_MixedError) if fails else contextlib.nullcontext()
    with torch.no_grad(), _compared_dtypes(), told:
        operation(given, weight, "meta")
