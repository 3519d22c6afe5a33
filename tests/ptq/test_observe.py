"""Statistics of layers' inputs against naive float64 sums, for every way in which layers read them."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator

import numpy as np
import pytest
import torch
from support.plain_blocks import recorded
from torch import Tensor, nn

from quantcli.algorithms.base import LinearStats
from quantcli.blocks.calls import Call
from quantcli.errors import InputError
from quantcli.ptq.observe import observe

WIDTH = 24
ALL = frozenset({"gram", "absmax", "mean_abs", "sample"})


class Block(nn.Module):
    """Attention-like projections of one input, a layer behind them, and experts that are sent some tokens, or none."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q", "k", "v", "out", "few", "many", "never"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, values: Tensor) -> Tensor:
        values = torch.tanh(self.q(values) + self.k(values)) * self.v(values)
        values = self.out(values)
        flat = values.reshape(-1, WIDTH)
        chosen = flat[:, 0] > 0.4
        mixed = torch.zeros_like(flat)
        if bool(chosen.any()):
            mixed[chosen] = self.few(flat[chosen])
        mixed[~chosen] = self.many(flat[~chosen])
        return mixed.reshape(values.shape)


LINEARS = ("q", "k", "v", "out", "few", "many", "never")


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


def calls(count: int = 4, tokens: int = 7) -> list[Call]:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(WIDTH, generator=generator) * 5
    shapes = [(2 + number % 2, tokens, WIDTH) for number in range(count)]
    return [Call(torch.randn(shape, generator=generator) * scale) for shape in shapes]


def inputs_of(block: nn.Module, name: str, given: list[Call]) -> np.ndarray:
    """All that a layer is given, float64 ``[tokens, columns]``."""
    with recorded([block.get_submodule(name)]) as seen, torch.no_grad():
        for call in given:
            block(call.hidden)
    return np.concatenate([args[0].reshape(-1, WIDTH).double().numpy() for args, _, _ in seen])


@pytest.mark.parametrize("runs", [((0, None),), ((0, 1), (1, 2), (2, 1))], ids=["one run", "three runs"])
@pytest.mark.parametrize("name", ["q", "out", "few", "many"])
def test_sums_are_those_of_naive_code(
    block: Block, monkeypatch: pytest.MonkeyPatch, name: str, runs: tuple[tuple[int, int | None], ...]
) -> None:
    monkeypatch.setattr("quantcli.ptq.observe._CHUNK_TOKENS", 5)  # several pieces of a batch
    found = observe(block, calls(), LINEARS, ALL, runs)[name]
    tokens = inputs_of(block, name, calls())
    assert found.tokens == len(tokens)
    assert found.gram is not None and found.absmax is not None and found.mean_abs is not None
    gram = tokens.T @ tokens
    np.testing.assert_allclose(found.gram.numpy(), gram, rtol=1e-5, atol=1e-5 * gram.diagonal().max())
    assert torch.equal(found.gram, found.gram.T)
    np.testing.assert_allclose(found.absmax.numpy(), np.abs(tokens).max(0), rtol=1e-6)
    np.testing.assert_allclose(found.mean_abs.numpy(), np.abs(tokens).mean(0), rtol=1e-5)
    assert found.sample is not None
    np.testing.assert_allclose(found.sample.numpy(), tokens, rtol=1e-6)  # so few that all are kept


def test_layers_that_read_one_tensor_share_one_object(block: Block) -> None:
    found = observe(block, calls(), LINEARS, ALL)
    assert found["q"] is found["k"] is found["v"]
    assert len({id(found[name]) for name in LINEARS}) == 5


def test_an_expert_that_sees_no_token(block: Block) -> None:
    assert observe(block, calls(), LINEARS, ALL)["never"] == LinearStats()


def test_only_what_is_needed_is_kept(block: Block) -> None:
    found = observe(block, calls(), LINEARS, {"absmax"})["q"]
    assert found.gram is found.mean_abs is found.sample is None
    assert found.absmax is not None and found.tokens == 70


def test_the_sample_is_spread_over_all_tokens(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcli.ptq.observe.SAMPLE_TOKENS", 64)
    given = calls(40, 8)  # 800 tokens, sequences of 8
    sample = observe(block, given, LINEARS, {"sample"})["q"].sample
    tokens = inputs_of(block, "q", given)
    assert sample is not None and 32 <= len(sample) <= 64
    places = [int(np.abs(tokens - row).sum(1).argmin()) for row in sample.double().numpy()]
    assert places == sorted(set(places))
    assert all(np.array_equal(tokens[place], row) for place, row in zip(places, sample.double().numpy(), strict=True))
    quarters = np.histogram(places, 4, (0, 800))[0]
    assert quarters.min() >= 0.6 * len(sample) / 4
    assert np.bincount([place % 8 for place in places], minlength=8).min() > 0  # every place of a sequence


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("needs", [{"gram"}, {"absmax"}, {"mean_abs"}, {"sample"}])
def test_inputs_that_are_not_finite_are_refused(block: Block, bad: float, needs: set[str]) -> None:
    given = calls()
    given[2].hidden[0, 3, 5] = bad
    with pytest.raises(InputError, match="q is given values that are not finite"):
        observe(block, given, LINEARS, needs)


class Apart(nn.Module):
    """Two layers that read one tensor at first only."""

    def __init__(self, *, skip: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.skip, self.calls = skip, 0

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        output: Tensor = self.one(values)
        if self.calls == 1:
            return output + self.two(values)
        return output if self.skip else output + self.two(values + 1)


@pytest.mark.parametrize("skip", [False, True])
def test_layers_that_share_their_input_at_times_are_refused(skip: bool) -> None:
    with pytest.raises(InputError, match=r"one and two read the same input in one sample.*--skip '\*\.two'"):
        observe(Apart(skip=skip), calls(), ("one", "two"), {"gram"})


class Later(nn.Module):
    """A layer that the first call does not reach, behind one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        output: Tensor = self.one(values)
        return output if self.calls == 1 else self.two(output)


def test_a_layer_that_is_reached_late_is_seen() -> None:
    found = observe(Later(), calls(), ("one", "two"), {"absmax"})
    assert found["one"].tokens == 70 and found["two"].tokens == 70 - 14


def test_hooks_are_gone_afterwards(block: Block) -> None:
    observe(block, calls(), LINEARS, ALL)
    with pytest.raises(InputError):
        observe(Apart(skip=True), calls(), ("one", "two"), ("gram",))
    assert all(not module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("needs", [set(), {"gram"}, ALL])
def test_batches_are_let_go(block: Block, needs: Collection[str]) -> None:
    given: list[weakref.ref[torch.UntypedStorage]] = []

    def stream() -> Iterator[Call]:
        for call in calls(4):
            fresh = call.hidden.clone()
            given.append(weakref.ref(fresh.untyped_storage()))
            yield Call(fresh)
            del fresh, call
            # The one before this may still be in a loop's variable.
            assert not any(each() for each in given[:-1])

    observe(block, stream(), LINEARS, needs)
    assert len(given) == 4


def test_division_by_a_scale() -> None:
    tokens = torch.randn(50, 6, dtype=torch.float64)
    scale = torch.rand(6) + 0.5
    stats = LinearStats(50, tokens.T.float() @ tokens.float(), tokens.abs().amax(0).float(), None, tokens[:3].float())
    stats.divide(scale)
    divided = tokens / scale
    assert stats.gram is not None and stats.absmax is not None and stats.sample is not None
    torch.testing.assert_close(stats.gram, (divided.T @ divided).float())
    torch.testing.assert_close(stats.absmax, divided.abs().amax(0).float())
    torch.testing.assert_close(stats.sample, divided[:3].float())
    assert stats.mean_abs is None


@pytest.mark.parametrize(("linears", "runs"), [(("q", "k", "out"), 1), (("q", "never"), 4)])
def test_where_nothing_is_asked_for_one_call_tells_that_every_layer_sees_tokens(
    block: Block, linears: tuple[str, ...], runs: int
) -> None:
    given = iter(calls(4))
    stats = observe(block, given, linears, ())
    assert len(list(given)) == 4 - runs
    assert [bool(stats[name].tokens) for name in linears] == [name != "never" for name in linears]


def test_tokens_that_are_all_zeros_do_not_count() -> None:
    """Llama 4 gives every expert all tokens, those times zero that the router sends elsewhere."""
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    hidden = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    hidden[:, 2:] = 0
    needs = {"gram", "absmax", "mean_abs", "sample"}
    seen = observe(block, [Call(hidden), Call(torch.zeros(1, 3, 4))], ["0"], needs)["0"]
    routed = observe(block, [Call(hidden[:, :2])], ["0"], needs)["0"]
    assert seen.tokens == routed.tokens == 2
    for name in needs:
        torch.testing.assert_close(getattr(seen, name), getattr(routed, name))
    assert observe(block, [Call(torch.zeros(1, 3, 4))], ["0"], needs)["0"].tokens == 0
    # Where nothing else is asked for, a later call may bring the first token.
    assert observe(block, [Call(torch.zeros(1, 3, 4)), Call(hidden)], ["0"], set())["0"].tokens == 2
