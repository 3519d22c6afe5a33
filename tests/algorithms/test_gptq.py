"""GPTQ against a column-by-column oracle in float64, and where its matrix is of no use."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support import oracles

from quantcli.algorithms import gptq, mse, rtn
from quantcli.core.numerics import dequantize, in_groups, quantize
from quantcli.core.scheme import Granularity, NumberFormat
from quantcli.core.tensors import QuantizedTensor

INT4 = NumberFormat("int4", Granularity("group", 32))
FORMATS = [
    INT4,
    NumberFormat("int4", Granularity("group", 32), symmetric=False),
    NumberFormat("int4", Granularity("channel")),
    NumberFormat("int8", Granularity("channel")),
    NumberFormat("int8", Granularity("tensor")),
    NumberFormat("nf4", Granularity("group", 32)),
]


def correlated(rows: int = 48, columns: int = 160, tokens: int = 600, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """A weight, inputs whose channels depend on each other, and their Hessian."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator) ** 3
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    weight = torch.randn(rows, columns, generator=generator)
    hessian = torch.zeros(columns, columns)
    gptq.add_hessian(hessian, inputs)
    return weight, inputs, hessian


def values(tensor: QuantizedTensor) -> np.ndarray:
    codes = in_groups(tensor.codes, tensor.number_format)
    decoded = dequantize(codes, tensor.scale, tensor.zero_point, tensor.number_format)
    return decoded.reshape(tensor.codes.shape).double().numpy()


def output_error(weight: torch.Tensor, decoded: np.ndarray, inputs: torch.Tensor) -> float:
    return float(np.square(inputs.double().numpy() @ (decoded - weight.double().numpy()).T).sum())


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_equals_the_oracle(number_format: NumberFormat) -> None:
    weight, inputs, hessian = correlated()
    solved = gptq.run(weight, number_format, torch.float32, hessian=hessian)
    naive = oracles.gptq(weight, hessian, solved.tensor, 0.01)
    assert solved.damping == 0.01
    ours, theirs = output_error(weight, values(solved.tensor), inputs), output_error(weight, naive, inputs)
    assert ours == pytest.approx(theirs, rel=0.02)
    # Float32 may tip a value that lies between two codes, and what follows it; that must stay rare.
    assert np.mean(np.abs(values(solved.tensor) - naive) > 1e-4) < 0.02


@pytest.mark.parametrize("number_format", [*FORMATS[:4], FORMATS[-1]], ids=str)
def test_error_is_far_below_rounding_to_the_same_grid(number_format: NumberFormat) -> None:
    weight, inputs, hessian = correlated()
    solved = gptq.run(weight, number_format, torch.float32, hessian=hessian)
    rounded = gptq.initial(weight, number_format, torch.float32)
    assert torch.equal(solved.tensor.scale, rounded.scale)
    ratio = output_error(weight, values(solved.tensor), inputs) / output_error(weight, values(rounded), inputs)
    assert ratio < 0.5


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, hessian = correlated()
    whole = gptq.run(weight, INT4, torch.float32, hessian=hessian).tensor
    monkeypatch.setattr(gptq, "CHUNK_ROWS", 7)
    assert torch.equal(gptq.run(weight, INT4, torch.float32, hessian=hessian).tensor.codes, whole.codes)


def test_arguments_are_not_changed() -> None:
    weight, _, hessian = correlated()
    before = weight.clone(), hessian.clone()
    gptq.run(weight, INT4, torch.float32, hessian=hessian)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_dead_inputs_are_rounded_like_any_other() -> None:
    weight, inputs, _ = correlated()
    inputs[:, [3, 40]] = 0
    hessian = inputs.T @ inputs
    solved = gptq.run(weight, INT4, torch.float32, hessian=hessian)
    assert solved.dead == 2
    nearest = mse.clipped(weight, INT4, torch.float32)
    assert torch.equal(solved.tensor.codes[:, [3, 40]], nearest.codes[:, [3, 40]])


def test_a_singular_matrix_is_damped_more() -> None:
    weight, inputs, _ = correlated()
    # Fewer tokens than channels, and rounding that left an eigenvalue below zero, further than 1% lifts.
    hessian = inputs[:40].T @ inputs[:40]
    hessian -= 0.05 * hessian.diagonal().mean() * torch.eye(len(hessian))
    solved = gptq.run(weight, INT4, torch.float32, hessian=hessian)
    assert solved.damping == pytest.approx(0.1)


@pytest.mark.parametrize("broken", [torch.zeros(160, 160), torch.full((160, 160), float("nan"))], ids=["unseen", "nan"])
def test_without_a_usable_matrix_it_is_the_clip_search(broken: torch.Tensor) -> None:
    weight, _, _ = correlated()
    solved = gptq.run(weight, INT4, torch.float32, hessian=broken)
    assert solved.damping is None
    assert torch.equal(solved.tensor.codes, mse.run(weight, INT4, torch.float32).codes)


def test_a_grid_chosen_elsewhere_is_kept() -> None:
    weight, inputs, hessian = correlated()
    wide = rtn.run(weight * 1.5, INT4, torch.float32)
    grid = replace(wide, codes=quantize(in_groups(weight, INT4), wide.scale, None, INT4).reshape(weight.shape))
    solved = gptq.run(weight, INT4, torch.float32, hessian=hessian, grid=grid)
    assert torch.equal(solved.tensor.scale, wide.scale)
    naive = oracles.gptq(weight, hessian, grid, 0.01)
    error = output_error(weight, values(solved.tensor), inputs)
    assert error == pytest.approx(output_error(weight, naive, inputs), rel=0.02)
    assert error < output_error(weight, values(grid), inputs)
