"""tune: gradients against naive ones, what is learned and what stays, interruptions, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.artifacts import contents, loaded, tensors_of
from support.plain_blocks import network, token_file
from torch import Tensor

from quantcli import convert
from quantcli.algorithms import rtn
from quantcli.algorithms.fake_quantize import LearnedFactors
from quantcli.algorithms.tune import Options as TuneOptions
from quantcli.algorithms.tune import TunedLinear
from quantcli.core.scheme import Granularity, NumberFormat
from quantcli.errors import InputError
from quantcli.planning.recipe import Recipe, validate
from quantcli.training import objective, tuning

pytestmark = pytest.mark.usefixtures("no_runtime_check")

FORMATS = [
    NumberFormat("int4", Granularity("group", 16)),
    NumberFormat("int4", Granularity("group", 16), symmetric=False),
    NumberFormat("int8", Granularity("channel")),
    NumberFormat("int8", Granularity("tensor")),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_gradients_are_those_of_the_decoded_weight(number_format: NumberFormat) -> None:
    tensor = rtn.run(random(24, 64), number_format, torch.float32)
    linear = TunedLinear(tensor, torch.float32, bias=random(24, seed=3))
    inputs, weights = random(2, 5, 64, seed=1).requires_grad_(), random(2, 5, 24, seed=2)
    output = linear(inputs)
    (output * weights).sum().backward()

    # The same in float64, as autograd sees it.
    factor = torch.ones_like(tensor.scale, dtype=torch.float64).requires_grad_()
    x = inputs.detach().double().requires_grad_()
    steps = tensor.codes.double().reshape(*tensor.scale.shape, -1)
    if tensor.zero_point is not None:
        steps = steps - tensor.zero_point.double().unsqueeze(-1)
    weight = (steps * (tensor.scale.double() * factor).unsqueeze(-1)).reshape(24, 64)
    wanted = x @ weight.T + random(24, seed=3)
    (wanted * weights).sum().backward()
    assert factor.grad is not None and x.grad is not None
    torch.testing.assert_close(output, wanted.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(inputs.grad, x.grad.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(linear.scales.factor.grad, factor.grad.float(), rtol=1e-5, atol=1e-5)


def test_scales_that_are_off_are_found() -> None:
    tensor = rtn.run(random(16, 64), FORMATS[0], torch.float32)
    right = tensor.scale.clone()
    tensor.scale = right * (1 + 0.1 * random(*right.shape, seed=1).clamp(-1, 1))
    linear, wanted = TunedLinear(tensor, torch.float32, None), (tensor.codes.float() * right.repeat_interleave(16, 1))
    inputs = random(32, 64, seed=2)
    options = TuneOptions(epochs=20, learning_rate=0.01)

    def loss(sample: int) -> Tensor:
        rows = inputs[sample * 4 : sample * 4 + 4]
        return objective.relative_error(rows @ wanted.T, linear(rows))

    losses = tuning.learn_factors([linear.scales], loss, 8, options, seed=0, tick=lambda _: None)
    assert len(losses) == 160
    assert losses[-1] < 0.01 * losses[0]
    assert float((linear.scales.values().detach() / right - 1).abs().amax()) < 0.01


def test_what_is_learned_is_what_will_be_stored() -> None:
    scales = LearnedFactors(random(8, 4).abs() + 1e-3, torch.bfloat16, scales=True)
    norms = LearnedFactors(random(64), torch.float16, scales=False)
    with torch.no_grad():
        scales.factor += 0.3 * random(8, 4, seed=1)
        norms.factor *= 1.001
    assert torch.equal(scales.values(), scales.values().bfloat16().float())
    assert torch.equal(norms.values(), norms.values().half().float())
    scales.values().sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(scales.factor.grad, scales._start)  # type: ignore[arg-type]


def test_divergence_is_zero_for_equal_outputs_and_as_defined_for_others() -> None:
    ours, theirs = random(2, 3, 7), random(2, 3, 7, seed=1)
    p, q = ours.double().softmax(-1), theirs.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(objective.divergence(ours, theirs).double(), expected, rtol=1e-5, atol=0)
    assert float(objective.divergence(ours, ours)) == pytest.approx(0, abs=1e-7)


def test_a_loss_that_is_not_finite_ends_it_and_names_the_step() -> None:
    factors = LearnedFactors(torch.ones(3), torch.float32, scales=True)
    values = iter([1.0, 1.0, float("nan")])

    def loss(_: int) -> Tensor:
        return factors.factor.sum() * next(values)

    with pytest.raises(InputError, match="nan in step 3 of 4") as caught:
        tuning.learn_factors([factors], loss, 4, TuneOptions(), 0, lambda _: None)
    assert "learning_rate" in (caught.value.hint or "")


def recipe(*steps: str | dict[str, Any]) -> Recipe:
    return validate({"scheme": "int4", "group_size": 32, "steps": list(steps)}, "test")


TUNE: dict[str, Any] = {"tune": {"epochs": 6, "learning_rate": 0.005}}


@pytest.fixture
def make(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """Converts the tiny llama with these steps, in a folder of this name."""
    data = token_file(tmp_path / "ids.npz")

    def run(name: str, *steps: str | dict[str, Any], model: str = "llama") -> Path:
        convert(models / model, tmp_path / name, recipe=recipe(*steps), data=data, threads=1)
        return tmp_path / name

    return run


def divergence(reference: torch.nn.Module, folder: Path, ids: Tensor) -> float:
    with torch.no_grad():
        ours = reference(ids).logits.double().log_softmax(-1)
        theirs = loaded(folder, "llama")(ids).logits.double().log_softmax(-1)
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


def test_codes_stay_scales_and_norms_move_and_outputs_come_nearer(
    models: Path, tmp_path: Path, make: Callable[..., Path]
) -> None:
    plain, tuned, without_norms = make("plain", "gptq"), make("tuned", "gptq", TUNE), None
    options = {"tune": {**TUNE["tune"], "norms": False}}
    without_norms = make("without_norms", "gptq", options)
    before, after, scales_only = (tensors_of(folder) for folder in (plain, tuned, without_norms))
    kinds = {"weight_packed": False, "weight_shape": False, "weight_scale": True, "layernorm.weight": True}
    for name, values in before.items():
        moves = next((moved for end, moved in kinds.items() if name.endswith(end)), False)
        assert torch.equal(values, after[name]) != moves, name
        assert torch.equal(values, scales_only[name]) != (moves and name.endswith("_scale")), name
        assert values.dtype == after[name].dtype
    reference = network(models / "llama")
    ids = torch.from_numpy(load_npz(tmp_path / "ids.npz"))
    found = [divergence(reference, folder, ids) for folder in (plain, tuned, without_norms)]
    assert found[1] < 0.8 * found[0] and found[2] < 0.9 * found[0]


def load_npz(path: Path) -> Any:
    import numpy as np

    with np.load(path) as arrays:
        return arrays["input_ids"]


def test_two_runs_are_equal_and_so_is_one_that_was_interrupted(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, again = make("whole", "gptq", TUNE), make("again", "gptq", TUNE)
    assert contents(whole) == contents(again)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("quantcli.training.tuning.learn_factors", interrupted)
        make("resumed", "gptq", TUNE)
    from quantcli.conversion.checkpoint import calibrated

    original, calls = calibrated.write_scales, iter(range(100))

    def stops(*args: Any) -> Any:
        return original(*args) if next(calls) < 3 else interrupted()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(calibrated, "write_scales", stops)
        make("resumed", "gptq", TUNE)
    learned = load_file(tmp_path / ".resumed.partial" / "scratch" / "tuned.safetensors")
    assert len(learned) > 3
    assert contents(make("resumed", "gptq", TUNE)) == contents(whole)


def test_error_of_the_weights_is_that_of_the_learned_scales(models: Path, make: Callable[..., Path]) -> None:
    from support.artifacts import decoded

    folder = make("tuned", "gptq", TUNE)
    original, weights = tensors_of(models / "llama"), decoded(folder)
    import json

    layers = json.loads((folder / "quantcli.json").read_text())["layers"]
    name = "model.layers.1.mlp.up_proj.weight"
    noise = (weights[name].double() - original[name].double()).square().sum()
    expected = 10 * torch.log10(original[name].double().square().sum() / noise)
    assert layers[name]["sqnr_db"] == pytest.approx(float(expected), abs=0.01)


def test_an_encoder_learns_from_its_hidden_states(models: Path, make: Callable[..., Path]) -> None:
    assert (make("bert", "gptq", TUNE, model="bert") / "model.safetensors").exists()


def test_encoder_decoders_are_refused(make: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="one list of blocks; this one has 2"):
        make("t5", "gptq", TUNE, model="t5")
