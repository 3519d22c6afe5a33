"""AWQ: scales and clipped ranges against searches in float64 that run the layers on the inputs themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.oracles import nearest_nf4
from torch import Tensor

from quantcli.algorithms import awq, mse, rtn
from quantcli.core import numerics
from quantcli.core.nf4 import NF4_CODEBOOK
from quantcli.core.scheme import PRESETS, Granularity, NumberFormat
from quantcli.core.tensors import QuantizedTensor

GROUP = Granularity("group", 16)
FORMATS = [
    NumberFormat("int4", GROUP),
    NumberFormat("int4", GROUP, symmetric=False),
    NumberFormat("int4", GROUP, symmetric=False, raised=True),
    NumberFormat("int4", Granularity("channel")),
    NumberFormat("int8", GROUP),
    NumberFormat("nf4", GROUP),
]
ROWS, COLUMNS, TOKENS = 24, 64, 200


def layer(rows: int = ROWS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and inputs with a few large, and correlated, channels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, COLUMNS, generator=generator)
    weight[torch.rand(rows, COLUMNS, generator=generator) < 0.02] *= 5
    inputs = torch.randn(TOKENS, COLUMNS, generator=generator)
    inputs = inputs @ (torch.eye(COLUMNS) + 0.3 * torch.randn(COLUMNS, COLUMNS, generator=generator))
    inputs[:, ::13] *= 12
    return weight, inputs


def gram(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs


def restored(tensor: QuantizedTensor) -> np.ndarray:
    codes = numerics.in_groups(tensor.codes, tensor.number_format).double().numpy()
    if tensor.number_format.dtype == "nf4":
        codes = np.array(NF4_CODEBOOK)[codes.astype(int)]
    zero = 0 if tensor.zero_point is None else tensor.zero_point.double().numpy()[..., None]
    return ((codes - zero) * tensor.scale.double().numpy()[..., None]).reshape(tensor.shape)


def nearest(values: np.ndarray, number_format: NumberFormat, dtype: torch.dtype, fraction: float = 1.0) -> np.ndarray:
    """One group rounded, its range multiplied by a fraction.

    Quotients are float32's, as they are at run time: the largest value lies half way between two codes.
    """
    values = values.astype(np.float32)
    if number_format.dtype == "nf4":
        absmax = float(np.abs(values).max() * np.float32(fraction))
        return nearest_nf4(values / absmax) * absmax
    lowest, steps = -(2 ** (number_format.bits - 1)), 2**number_format.bits - 1
    if number_format.symmetric:
        high = np.abs(values).max() * np.float32(fraction)
        if number_format.granularity.kind == "group" and number_format.bits == 4 and values.max() > -values.min():
            high = -high
        low = -high
    else:
        low, high = min(0.0, values.min()) * fraction, max(0.0, values.max()) * fraction
    if number_format.raised:
        low = min(low, -high / (steps - 1))
    scale = torch.tensor((high - low) / steps).to(dtype).item()
    first = lowest + number_format.raised
    zero = 0 if number_format.symmetric else np.clip(np.round(lowest - low / scale), first, lowest + steps)
    quotients = np.round(values / np.float32(scale)).astype(np.float64)
    return (np.clip(quotients + zero, lowest, lowest + steps) - zero) * scale


def grouped(matrix: np.ndarray, number_format: NumberFormat) -> list[tuple[int, slice]]:
    size = number_format.granularity.size or matrix.shape[1]
    return [
        (row, slice(start, start + size)) for row in range(len(matrix)) for start in range(0, matrix.shape[1], size)
    ]


def output_error(weight: Tensor, changed: np.ndarray, inputs: Tensor) -> float:
    """Squared error of the layer's outputs, by running it."""
    return float((((changed - weight.double().numpy()) @ inputs.double().numpy().T) ** 2).sum())


def scaled_error(
    scale: np.ndarray, weights: list[Tensor], inputs: Tensor, number_format: NumberFormat, dtype: torch.dtype
) -> float:
    total = 0.0
    for weight in weights:
        changed = (weight.numpy() * scale.astype(np.float32)).astype(np.float64)
        for row, part in grouped(changed, number_format):
            changed[row, part] = nearest(changed[row, part], number_format, dtype)
        total += output_error(weight, changed / scale, inputs)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_the_scale_has_the_least_output_error_of_the_papers_grid(
    number_format: NumberFormat, dtype: torch.dtype
) -> None:
    (first, inputs), (second, _) = layer(), layer(8, seed=1)
    magnitude = inputs.abs().mean(0)
    formats = [number_format, number_format]
    chosen = awq.choose_scale(gram(inputs), magnitude, [first, second], formats, dtype)
    candidates = []
    for step in range(20):
        # By torch's own power: the largest weight of a group lies half way between two codes.
        scale = magnitude.pow(step / 20)
        candidates.append((scale / (scale.max() * scale.min()).sqrt()).numpy())
    errors = [scaled_error(scale, [first, second], inputs, number_format, dtype) for scale in candidates]
    best = int(np.argmin(errors))
    error = scaled_error(chosen.double().numpy(), [first, second], inputs, number_format, dtype)
    assert error == pytest.approx(errors[best], rel=1e-4)
    np.testing.assert_allclose(chosen, candidates[best], rtol=1e-5)
    assert number_format.bits == 8 or errors[best] < 0.9 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_each_group_is_clipped_to_its_least_output_error(number_format: NumberFormat, dtype: torch.dtype) -> None:
    weight, inputs = layer()
    tensor = awq.run(weight, number_format, dtype, gram=gram(inputs))
    found, real = restored(tensor), weight.double().numpy()
    for row, part in grouped(real, number_format):
        own = inputs.double().numpy()[:, part].T
        tried = [nearest(real[row, part], number_format, dtype, fraction) for fraction in mse.RANGE_FRACTIONS]
        least = min(float((((each - real[row, part]) @ own) ** 2).sum()) for each in tried)
        assert float((((found[row, part] - real[row, part]) @ own) ** 2).sum()) == pytest.approx(least, rel=2e-3)


@pytest.mark.parametrize("number_format", FORMATS[:2], ids=str)
def test_clipping_by_output_error_beats_clipping_by_weight_error(number_format: NumberFormat) -> None:
    weight, inputs = layer(rows=256)
    errors = [
        output_error(weight, restored(tensor), inputs)
        for tensor in (
            awq.run(weight, number_format, torch.float32, gram=gram(inputs)),
            mse.run(weight, number_format, torch.float32),
            rtn.run(weight, number_format, torch.float32),
        )
    ]
    assert errors[0] < 0.9 * min(errors[1:])


def test_results_do_not_depend_on_how_rows_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer()
    whole = awq.run(weight, FORMATS[1], torch.bfloat16, gram=gram(inputs))
    monkeypatch.setattr(awq, "CHUNK_ELEMENTS", 5 * COLUMNS)
    parts = awq.run(weight, FORMATS[1], torch.bfloat16, gram=gram(inputs))
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scale, parts.scale)
    assert (whole.codes.dtype, whole.zero_point.dtype, whole.shape) == (torch.int8, torch.int8, (ROWS, COLUMNS))
    assert torch.equal(whole.scale, whole.scale.bfloat16().float()) and whole.scale.is_contiguous()


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_without_inputs_nothing_is_scaled_or_clipped(number_format: NumberFormat) -> None:
    weight, _ = layer()
    zeros = torch.zeros(COLUMNS, COLUMNS)
    tensor = awq.run(weight, number_format, torch.float32, gram=zeros)
    plain = weight.double().numpy()
    for row, part in grouped(plain, number_format):
        plain[row, part] = nearest(plain[row, part], number_format, torch.float32)
    np.testing.assert_allclose(restored(tensor), plain, rtol=1e-6)
    scale = awq.choose_scale(zeros, torch.zeros(COLUMNS), [weight], [number_format], torch.float32)
    assert torch.equal(scale, torch.ones(COLUMNS))


def test_dead_channels_keep_a_scale_of_one_and_zero_weights_are_allowed() -> None:
    weight, inputs = layer()
    inputs[:, [3, 40]] = 0
    weight[:, 7] = 0
    weight[5] = 0
    scale = awq.choose_scale(gram(inputs), inputs.abs().mean(0), [weight], FORMATS[:1], torch.bfloat16)
    assert scale[[3, 40]].tolist() == [1, 1]
    assert bool((torch.isfinite(scale) & (scale > 0)).all()) and float(scale.max()) > 1
    tensor = awq.run(weight, FORMATS[0], torch.bfloat16, gram=gram(inputs))
    assert bool(torch.isfinite(tensor.scale).all()) and not tensor.codes[5].any()


def test_scales_that_are_tied_are_equal() -> None:
    weight, inputs = layer()

    def tie(values: Tensor) -> Tensor:
        return values.reshape(2, -1).mean(0).repeat(2)

    scale = awq.choose_scale(gram(inputs), inputs.abs().mean(0), [weight], FORMATS[:1], torch.float32, tie)
    assert torch.equal(scale[:32], scale[32:]) and len(scale.unique()) > 1


def test_large_layers_are_searched_on_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer(rows=40)
    monkeypatch.setattr(awq, "SEARCH_ROWS", 10)
    arguments = (gram(inputs), inputs.abs().mean(0))
    some = awq.choose_scale(*arguments, [weight], FORMATS[:1], torch.float32)
    assert torch.equal(some, awq.choose_scale(*arguments, [weight[::4]], FORMATS[:1], torch.float32))


def test_supports() -> None:
    assert awq.supports(PRESETS["int4"].weights) is None and awq.supports(PRESETS["int8"].weights) is None
    assert awq.supports(PRESETS["nf4"].weights) is None
    assert "not per tensor" in (awq.supports(NumberFormat("int8")) or "")
