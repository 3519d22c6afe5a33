"""AutoRound against a naive version on autograd, and what it is worth on a small block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from quantcli.algorithms import autoround, mse, rtn
from quantcli.algorithms.autoround import SCALE_RANGE, LearnedRounding, Options
from quantcli.blocks.calls import Call
from quantcli.core.numerics import code_range, decoded, in_groups
from quantcli.core.scheme import Granularity, NumberFormat
from quantcli.core.tensors import QuantizedTensor

WIDTH = 32
INT4 = NumberFormat("int4", Granularity("group", 16))
FORMATS = [
    INT4,
    NumberFormat("int4", Granularity("group", 16), symmetric=False),
    NumberFormat("int4", Granularity("channel")),
    NumberFormat("int8", Granularity("channel")),
    NumberFormat("int8", Granularity("tensor")),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they give in matrices so small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    """Two layers with a nonlinearity, and one that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = values + self.down(nn.functional.silu(self.up(values)))
        return output


@dataclass
class Setting:
    """A block, its inputs and what it returns."""

    block: Block
    calls: list[Call]
    targets: list[Tensor]

    def run(self, number_format: NumberFormat = INT4, seed: int = 0, **options: float) -> dict[str, QuantizedTensor]:
        formats = dict.fromkeys(("up", "down", "unused"), number_format)
        chosen = Options.model_validate(options)
        return autoround.run(self.block, formats, self.calls, self.targets, torch.float32, chosen, seed, lambda _: None)

    def error(self, weights: dict[str, Tensor]) -> float:
        """Squared error of the block's output with other weights, in float64 and written out."""
        total = 0.0
        up, down = weights["up"].double(), weights["down"].double()
        for call, wanted in zip(self.calls, self.targets, strict=True):
            values = call.hidden.double()
            hidden = values @ up.T + self.block.up.bias.double()
            hidden = hidden / (1 + torch.exp(-hidden))
            output = values + hidden @ down.T + self.block.down.bias.double()
            total += float((output - wanted.double()).square().sum())
        return total


@pytest.fixture
def setting() -> Setting:
    torch.manual_seed(0)
    block = Block().eval().requires_grad_(False)
    mixing = torch.randn(WIDTH, WIDTH) * torch.rand(WIDTH) ** 2
    shapes: Sequence[tuple[int, int]] = [(3, 11), (2, 11), (4, 7)]
    calls = [Call(torch.randn(*shape, WIDTH) @ mixing) for shape in shapes]
    with torch.no_grad():
        return Setting(block, calls, [block(call.hidden) for call in calls])


def initial(weight: Tensor, form: NumberFormat) -> QuantizedTensor:
    """The full range; in symmetric groups of four bits the weight of the largest magnitude is the code -8."""
    start = rtn.run(weight, form, torch.float32)
    if form.symmetric and form.bits == 4 and form.granularity.kind == "group":
        groups = in_groups(weight, form)
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        start.scale = largest / -8
        steps = torch.round(groups / start.scale.unsqueeze(-1)).clamp(-8, 7)
        start.codes = steps.to(torch.int8).reshape(weight.shape)
    return start


def straight_through(
    original: Tensor, offset: Tensor, factor: Tensor, base: Tensor, zero_point: Tensor | None, form: NumberFormat
) -> Tensor:
    """The rounded weight, with gradients by offset and factor as if rounding changed nothing."""
    low, high = code_range(form)
    zero = 0.0 if zero_point is None else zero_point.float().unsqueeze(-1)
    scale = base * factor
    exact = original / scale + offset
    rounded = exact + (torch.round(exact) - exact).detach() + zero
    return (rounded.clamp(low, high) - zero) * scale


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_step_follows_the_straight_through_gradient(form: NumberFormat) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 32, generator=generator)
    start = initial(weight, form)
    rounding = LearnedRounding.start(weight, form, torch.float32)
    groups = in_groups(weight, form)
    offset, factor = torch.zeros_like(groups), torch.ones_like(start.scale.unsqueeze(-1))
    for step in range(20):
        naive_offset, naive_factor = offset.clone().requires_grad_(), factor.clone().requires_grad_()
        naive = straight_through(groups, naive_offset, naive_factor, start.scale.unsqueeze(-1), start.zero_point, form)
        torch.testing.assert_close(rounding.weight(), naive.detach(), rtol=1e-6, atol=1e-6)
        gradient = torch.randn(groups.shape, generator=generator)
        by_offset, by_factor = torch.autograd.grad((naive * gradient).sum(), [naive_offset, naive_factor])
        rate = 0.02 * (1 - step / 20)
        rounding.learn(gradient.reshape(weight.shape), rate)
        offset = (offset - rate * by_offset.sign()).clamp(-0.5, 0.5)
        factor = (factor - rate * by_factor.sign()).clamp(*SCALE_RANGE)
        torch.testing.assert_close(rounding.offset, offset)
        torch.testing.assert_close(rounding.factor, factor)
    assert bool((offset != 0).any()) and bool((factor != 1).any())


@pytest.mark.parametrize("limit", SCALE_RANGE)
def test_scales_and_offsets_keep_within_their_limits(limit: float) -> None:
    generator = torch.Generator().manual_seed(4)
    rounding = LearnedRounding.start(torch.randn(16, 64, generator=generator), INT4, torch.float32)
    rounding.factor.fill_(limit)
    rounding.offset.fill_(0.5)
    for _ in range(3):
        rounding.learn(torch.randn(16, 64, generator=generator), 0.01)
    assert SCALE_RANGE[0] <= float(rounding.factor.min()) < float(rounding.factor.max()) <= SCALE_RANGE[1]
    assert -0.5 <= float(rounding.offset.min()) < float(rounding.offset.max()) <= 0.5


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_codes_decode_to_the_weight_that_was_learned(form: NumberFormat, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    rounding = LearnedRounding.start(weight, form, dtype)
    for step in range(5):
        rounding.learn(torch.randn(6, 32, generator=torch.Generator().manual_seed(step)), 0.05)
    tensor = rounding.tensor(weight.shape)
    low, high = code_range(form)
    assert int(tensor.codes.min()) >= low and int(tensor.codes.max()) <= high
    assert torch.equal(tensor.scale.to(dtype).float(), tensor.scale)
    torch.testing.assert_close(decoded(tensor), rounding.weight().reshape(weight.shape), rtol=1e-6, atol=1e-7)


def naive_run(setting: Setting, form: NumberFormat, iterations: int) -> dict[str, Tensor]:
    """Weights learned on all samples at a time, by autograd through rounding itself: the best of a few states."""
    originals = {"up": setting.block.up.weight.detach(), "down": setting.block.down.weight.detach()}
    starts = {name: initial(weight, form) for name, weight in originals.items()}
    groups = {name: in_groups(weight, form) for name, weight in originals.items()}
    offsets = {name: torch.zeros_like(each) for name, each in groups.items()}
    factors = {name: torch.ones_like(start.scale.unsqueeze(-1)) for name, start in starts.items()}

    def rounded(name: str) -> Tensor:
        base, zero_point = starts[name].scale.unsqueeze(-1), starts[name].zero_point
        weight = straight_through(groups[name], offsets[name], factors[name], base, zero_point, form)
        return weight.reshape(originals[name].shape)

    best: tuple[float, dict[str, Tensor]] = (float("inf"), {})
    for iteration in range(iterations + 1):
        for each in (*offsets.values(), *factors.values()):
            each.requires_grad_(True)
        parameters = {f"{name}.weight": rounded(name) for name in originals}
        outputs = [torch.func.functional_call(setting.block, parameters, (call.hidden,)) for call in setting.calls]
        loss = sum(((out - wanted) ** 2).sum() for out, wanted in zip(outputs, setting.targets, strict=True))
        assert isinstance(loss, Tensor)
        if iteration in (0, iterations // 2, iterations * 3 // 4, iterations) and float(loss) < best[0]:
            best = float(loss), {name: rounded(name).detach() for name in originals}
        if iteration == iterations:
            break
        everything = [*offsets.values(), *factors.values()]
        gradients = torch.autograd.grad(loss, everything)
        rate = (1 - iteration / iterations) / iterations
        for each, gradient, limits in zip(everything, gradients, [(-0.5, 0.5)] * 2 + [SCALE_RANGE] * 2, strict=True):
            each.requires_grad_(False)
            each.sub_(rate * gradient.sign()).clamp_(*limits)
    return best[1]


@pytest.mark.parametrize("form", FORMATS[:4], ids=str)
def test_equals_a_naive_version(setting: Setting, form: NumberFormat) -> None:
    found = setting.run(form, iterations=12, batch_size=9)
    for name, expected in naive_run(setting, form, 12).items():
        off = (decoded(found[name]) - expected).abs() > 1e-5 * expected.abs().max()
        # The sign of a gradient next to zero may tip, and the code with it.
        assert float(off.float().mean()) < 0.02, name


@pytest.mark.parametrize("form", FORMATS[:3], ids=str)
def test_the_output_is_closer_than_with_weights_rounded_by_themselves(setting: Setting, form: NumberFormat) -> None:
    weights = {"up": setting.block.up.weight.detach(), "down": setting.block.down.weight.detach()}
    plain = [
        setting.error({name: decoded(algorithm.run(weight, form, torch.float32)) for name, weight in weights.items()})
        for algorithm in (rtn, mse)
    ]
    found = setting.run(form, iterations=100, batch_size=4)
    own = setting.error({name: decoded(found[name]) for name in weights})
    assert own < 0.7 * min(plain)
    assert setting.error(weights) < 1e-6 * own


def test_a_layer_that_no_input_reaches_is_rounded_as_it_is(setting: Setting) -> None:
    found = setting.run(iterations=5)["unused"]
    expected = initial(setting.block.unused.weight.detach(), INT4)
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.scale, expected.scale)


def test_weights_are_put_back(setting: Setting) -> None:
    before = {name: each.detach().clone() for name, each in setting.block.named_parameters()}
    setting.run(iterations=3)
    for name, each in setting.block.named_parameters():
        assert torch.equal(each, before[name]) and each.grad is None
        assert not each.requires_grad


def test_it_never_ends_worse_than_it_began(setting: Setting) -> None:
    weights = {"up": setting.block.up.weight.detach(), "down": setting.block.down.weight.detach()}
    start = setting.error({name: decoded(initial(weight, INT4)) for name, weight in weights.items()})
    found = setting.run(iterations=2, learning_rate=0.5)  # far too much at a time
    assert setting.error({name: decoded(found[name]) for name in weights}) <= start * (1 + 1e-6)


def test_a_seed_decides_all(setting: Setting) -> None:
    one, same, other = (setting.run(seed=seed, iterations=40, batch_size=4) for seed in (1, 1, 2))
    assert all(torch.equal(one[name].codes, same[name].codes) for name in one)
    assert all(torch.equal(one[name].scale, same[name].scale) for name in one)
    assert not torch.equal(one["up"].codes, other["up"].codes)


def test_every_sample_comes_once_before_any_comes_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    places = {id(call): number for number, call in enumerate(setting.calls)}
    original = Call.rows

    def rows(self: Call, chosen: Sequence[int]) -> Call:
        seen.extend((places[id(self)], row) for row in chosen)
        return original(self, chosen)

    monkeypatch.setattr(Call, "rows", rows)
    setting.run(iterations=9, batch_size=4)
    assert len(seen) == 36
    assert set(Counter(seen).values()) == {4}


def test_progress_and_rate(setting: Setting) -> None:
    told: list[float] = []
    options = Options(iterations=4, learning_rate=1e-9)
    formats = {"up": INT4}
    found = autoround.run(
        setting.block, formats, setting.calls, setting.targets, torch.float32, options, 0, told.append
    )
    assert told == [0.25, 0.5, 0.75, 1.0]
    # So slow that nothing moves.
    assert torch.equal(found["up"].codes, initial(setting.block.up.weight.detach(), INT4).codes)


def test_nf4_is_refused() -> None:
    assert "nf4" in str(autoround.supports(NumberFormat("nf4", Granularity("block", 64))))
    assert autoround.supports(INT4) is None
