"""SmoothQuant: the scale against the paper's formula and a search in float64 that quantizes everything by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from quantcli.algorithms import smoothquant
from quantcli.core.scheme import PRESETS, NumberFormat, Scheme

DYNAMIC = PRESETS["int8-dynamic"]
STATIC = Scheme(DYNAMIC.weights, NumberFormat("int8"))
COLUMNS = 48


def layers() -> tuple[Tensor, list[Tensor]]:
    """Inputs with a few channels far above the others, and two weights that read them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(150, COLUMNS, generator=generator) * (0.2 + torch.rand(COLUMNS, generator=generator))
    inputs[:, ::11] *= 60
    return inputs, [torch.randn(rows, COLUMNS, generator=generator) * 0.1 for rows in (20, 9)]


def quantized(values: np.ndarray, absmax: np.ndarray) -> np.ndarray:
    """Symmetric int8 by hand; quotients are float32's, in which the largest value lies half way between codes."""
    scale = (absmax.astype(np.float32) / np.float32(127.5)).astype(np.float32)
    return np.clip(np.round(values.astype(np.float32) / scale), -128, 127) * scale.astype(np.float64)


def error(scale: np.ndarray, inputs: Tensor, weights: list[Tensor], scheme: Scheme, absmax: Tensor) -> float:
    """Relative squared error of both outputs, added up."""
    scaled = inputs.numpy() / scale.astype(np.float32)
    tokens = np.abs(scaled).max(1, keepdims=True)
    rounded = quantized(scaled, tokens if scheme == DYNAMIC else np.array((absmax.numpy() / scale).max()))
    total = 0.0
    for weight in weights:
        columns = weight.numpy() * scale.astype(np.float32)
        wanted = inputs.double().numpy() @ weight.double().numpy().T
        got = rounded @ quantized(columns, np.abs(columns).max(1, keepdims=True)).T
        total += ((got - wanted) ** 2).sum() / (wanted**2).sum()
    return float(total)


def paper(inputs: Tensor, weights: list[Tensor], alpha: float) -> np.ndarray:
    """Equation 4, divided by its geometric mean."""
    activation = np.abs(inputs.double().numpy()).max(0)
    weight = np.abs(np.concatenate([each.double().numpy() for each in weights])).max(0)
    scale = activation**alpha / weight ** (1 - alpha)
    return scale / np.exp(np.log(scale).mean())


@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC], ids=["per token", "per tensor"])
def test_the_scale_has_the_least_output_error_of_all_alphas(scheme: Scheme) -> None:
    inputs, weights = layers()
    absmax = inputs.abs().amax(0)
    candidates = [np.ones(COLUMNS), *(paper(inputs, weights, alpha) for alpha in smoothquant.ALPHAS)]
    errors = [error(scale, inputs, weights, scheme, absmax) for scale in candidates]
    best = int(np.argmin(errors))
    chosen = smoothquant.choose_scale(absmax, inputs, weights, [scheme, scheme])
    # Neighbours on the grid may be equally good but for rounding, so it is errors that are compared.
    assert error(chosen.numpy(), inputs, weights, scheme, absmax) == pytest.approx(errors[best], rel=1e-3)
    assert any(np.allclose(chosen, candidate, rtol=1e-4) for candidate in candidates)
    assert 0 < best < len(candidates) and errors[best] < 0.5 * errors[0]


def test_a_scale_that_makes_things_worse_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothquant, "ALPHAS", (-1.0, 4.0))
    inputs, weights = layers()
    scale = smoothquant.choose_scale(inputs.abs().amax(0), inputs, weights, [DYNAMIC, DYNAMIC])
    assert torch.equal(scale, torch.ones(COLUMNS))


def test_a_static_range_comes_from_all_inputs_not_from_the_sample() -> None:
    inputs, weights = layers()
    absmax = inputs.abs().amax(0)
    sample = inputs[:50] / 100
    chosen = smoothquant.choose_scale(absmax, sample, weights, [STATIC, STATIC])
    candidates = [np.ones(COLUMNS), *(paper(inputs, weights, alpha) for alpha in smoothquant.ALPHAS)]
    errors = [error(scale, sample, weights, STATIC, absmax) for scale in candidates]
    np.testing.assert_allclose(chosen, candidates[int(np.argmin(errors))], rtol=1e-4)


def test_zero_channels_keep_a_scale_of_one() -> None:
    inputs, weights = layers()
    inputs[:, 3] = 0
    for weight in weights:
        weight[:, 22] = 0
    scale = smoothquant.choose_scale(inputs.abs().amax(0), inputs, weights, [DYNAMIC, DYNAMIC])
    assert scale[[3, 22]].tolist() == [1, 1]
    assert bool((torch.isfinite(scale) & (scale > 0)).all()) and float(scale.max()) > 2


@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC], ids=["per token", "per tensor"])
@pytest.mark.parametrize("which", ["inputs", "weights", "no tokens"])
def test_layers_without_any_signal_are_left_alone(scheme: Scheme, which: str) -> None:
    inputs, weights = layers()
    if which == "weights":
        weights = [torch.zeros_like(weight) for weight in weights]
    else:
        inputs = torch.zeros(0 if which == "no tokens" else 5, COLUMNS)
    absmax = inputs.abs().amax(0) if len(inputs) else torch.zeros(COLUMNS)
    assert torch.equal(smoothquant.choose_scale(absmax, inputs, weights, [scheme, scheme]), torch.ones(COLUMNS))


def test_scales_that_are_tied_are_equal() -> None:
    inputs, weights = layers()

    def tie(values: Tensor) -> Tensor:
        return values.reshape(2, -1).amax(0).repeat(2)

    scale = smoothquant.choose_scale(inputs.abs().amax(0), inputs, weights, [DYNAMIC, DYNAMIC], tie)
    assert torch.equal(scale[:24], scale[24:]) and len(scale.unique()) > 1


def rounded_weights_error(inputs: Tensor, weights: list[Tensor], scale: Tensor) -> float:
    """Relative squared error of the outputs with inputs as they are and int8 weights, naively in float64."""
    total = 0.0
    for weight in weights:
        scaled = (weight * scale).double()
        step = scaled.abs().amax(1, keepdim=True) / 127.5
        found = (inputs / scale).double() @ ((scaled / step).round().clamp(-128, 127) * step).T
        wanted = inputs.double() @ weight.double().T
        total += float((found - wanted).square().sum() / wanted.square().sum())
    return total


def test_a_scheme_for_each_layer() -> None:
    inputs, weights = layers()
    absmax = inputs.abs().amax(0)
    weight_only = PRESETS["int8"]
    alone = smoothquant.choose_scale(absmax, inputs, weights, [weight_only, weight_only])
    assert rounded_weights_error(inputs, weights, alone) <= rounded_weights_error(inputs, weights, torch.ones(COLUMNS))
    mixed = smoothquant.choose_scale(absmax, inputs, weights, [weight_only, STATIC])
    assert float(mixed.max()) > 2


def test_supports() -> None:
    assert smoothquant.supports(PRESETS["int8"].weights) is None
    assert "nf4 is none" in (smoothquant.supports(PRESETS["nf4"].weights) or "")
