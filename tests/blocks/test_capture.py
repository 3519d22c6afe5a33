"""What blocks are called with: a model run block by block gives what it gives in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support.plain_blocks import LISTS, hidden, network, recorded
from torch import Tensor, nn

from quantcli.blocks.calls import Call
from quantcli.blocks.capture import Arguments, Capture, Captured, alike, replaying
from quantcli.errors import InputError


def tokens(shape: tuple[int, int], *, padded: bool, decoder: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    batch = {"input_ids": torch.randint(3, 96, shape, generator=generator)}
    if padded:
        batch["attention_mask"] = torch.ones(shape, dtype=torch.int64)
        batch["attention_mask"][0, -3:] = 0
    if decoder:
        batch["decoder_input_ids"] = torch.randint(3, 96, (shape[0], decoder), generator=generator)
    return batch


def batches(name: str) -> Iterator[dict[str, Tensor]]:
    if name == "vit":
        for count in (2, 3):
            yield {"pixel_values": torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))}
        return
    for shape, padded in (((3, 10), False), ((1, 17), False), ((3, 10), True)):
        yield tokens(shape, padded=padded, decoder=7 if name in ("t5", "bart") else 0)


def advance(blocks: list[nn.Module], captured: Captured) -> Iterator[Tensor]:
    """What each block returns in turn."""
    state = captured.hidden
    for block, arguments in zip(blocks, captured.arguments, strict=True):
        with torch.no_grad():
            state = arguments.call(state).run(block)
        yield state


def compare(model: nn.Module, lists: list[str], batch: dict[str, Tensor]) -> None:
    """The same hidden states behind every block, list after list, and the same output with all of them replayed."""
    groups = [list(model.get_submodule(path).children()) for path in lists]
    with recorded([block for group in groups for block in group]) as calls, torch.no_grad():
        whole = model(**batch)
    expected = iter([hidden(output) for _, _, output in calls])
    earlier: list[tuple[list[nn.Module], Tensor, Any]] = []
    for blocks in groups:
        kept = [block.state_dict() for block in blocks[1:]]
        for block in blocks[1:]:  # only the first block may be needed
            block.to("meta")
        with Replayed(earlier):
            captured = Capture(model, blocks).run(batch)
        for block, weights in zip(blocks[1:], kept, strict=True):
            block.load_state_dict(weights, assign=True)
        state = captured.hidden
        for state in advance(blocks, captured):
            torch.testing.assert_close(state, next(expected), rtol=0, atol=1e-5)
        earlier.append((blocks, state, captured.returned))
    with Replayed(earlier), torch.no_grad():
        replayed = model(**batch)
    torch.testing.assert_close(replayed[0], whole[0], rtol=0, atol=1e-5)


class Replayed:
    """Several finished lists of blocks at once."""

    def __init__(self, earlier: list[tuple[list[nn.Module], Tensor, Any]]) -> None:
        self.contexts = [replaying(*each) for each in earlier]

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *_: object) -> None:
        for context in self.contexts:
            context.__exit__(None, None, None)


@pytest.mark.parametrize("name", [each for each in LISTS if each != "gpt2"])
def test_block_by_block_is_the_same_as_at_once(models: Path, name: str) -> None:
    model = network(models / name)
    for batch in batches(name):
        compare(model, LISTS[name], batch)


SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("build", "path"),
    [
        # A window in one layer and none in another: masks and positions differ from block to block.
        (
            lambda: tf.Gemma3ForCausalLM(
                tf.Gemma3TextConfig(
                    **SIZES, num_key_value_heads=1, head_dim=16, sliding_window=4, sliding_window_pattern=2
                )
            ),
            "model.layers",
        ),
        (
            lambda: tf.DebertaV2Model(
                tf.DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8)
            ),
            "encoder.layer",
        ),
        (lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES)), "gpt_neox.layers"),
    ],
    ids=["gemma3", "deberta", "neox"],
)
def test_models_with_arguments_of_their_own(build: Callable[[], nn.Module], path: str) -> None:
    torch.manual_seed(0)
    model = build().eval()
    for shape, padded in (((2, 12), False), ((2, 12), True)):
        compare(model, [path], tokens(shape, padded=padded))


class Chain(nn.Module):
    """Blocks called as ``route`` says: their numbers, in order."""

    def __init__(self, route: list[int], *, named: bool = False, grow: bool = False) -> None:
        super().__init__()
        self.route, self.named = route, named
        self.layers = nn.ModuleList([nn.Linear(4, 8 if grow else 4) for _ in range(3)])

    def forward(self, values: Tensor) -> Tensor:
        for number in self.route:
            block = self.layers[number]
            output = block(hidden_states=values) if self.named else block(values)
            values = output[0] if isinstance(output, tuple) else output
        return values


@pytest.mark.parametrize("route", [[0, 1], [1, 0, 2], [0, 0, 2], [0, 0, 1, 2], [0, 2]])
def test_blocks_that_are_no_chain_are_refused(route: list[int]) -> None:
    model = Chain(route)
    hint = r"such as mse" if len(set(route)) < len(route) else r"blocks: \["
    with pytest.raises(InputError, match=rf"\(3\) are not called .* each once: it calls .*{hint}"):
        Capture(model, list(model.layers)).run({"values": torch.zeros(2, 4)})
    assert all("forward" not in vars(block) for block in model.layers)


class Tail(Chain):
    """What comes after the blocks fails."""

    def forward(self, values: Tensor) -> Tensor:
        super().forward(values)
        raise RuntimeError("not loaded")


def test_one_block_that_is_called_again() -> None:
    again = Chain([0, 0])
    again.layers = nn.ModuleList([nn.Linear(4, 4)])
    with pytest.raises(InputError, match=r"\(1\) are not called .* it calls 0, 0\. Use an algorithm without data"):
        Capture(again, list(again.layers)).run({"values": torch.zeros(2, 4)})
    once = Tail([0])
    once.layers = nn.ModuleList([nn.Linear(4, 4)])
    capture = Capture(once, list(once.layers))
    for number in range(2):
        found = capture.run({"values": torch.full((2, 4), float(number))})
        assert float(found.hidden.mean()) == number and len(found.arguments) == 1


def test_blocks_that_change_the_shape_are_refused() -> None:
    model = Chain([0, 1, 2], grow=True)
    with pytest.raises(InputError, match=r"\(Linear\) change the shape of hidden states, from \[2, 4\] to \[2, 8\]"):
        Capture(model, list(model.layers)).run({"values": torch.zeros(2, 4)})


class Named(nn.Module):
    def forward(self, hidden_states: Tensor, *, scale: float = 1.0) -> Tensor:
        return hidden_states * scale + 1


def test_hidden_states_by_name() -> None:
    model = Chain([0, 1, 2], named=True)
    model.layers = nn.ModuleList([Named(), Named(), Named()])
    captured = Capture(model, list(model.layers)).run({"values": torch.zeros(2, 4)})
    assert torch.equal(captured.hidden, torch.zeros(2, 4))
    assert all(each == Arguments() for each in captured.arguments) and captured.returned is None
    assert [float(state.mean()) for state in advance(list(model.layers), captured)] == [1.0, 2.0, 3.0]


def test_a_block_that_is_given_no_hidden_states() -> None:
    model = Chain([0])
    model.layers = nn.ModuleList([nn.Identity()])
    with pytest.raises(InputError, match="not called with hidden states"):
        Capture(model, list(model.layers)).run({"values": [1.0]})  # type: ignore[dict-item]


def test_a_model_that_fails_says_on_what(models: Path) -> None:
    model = network(models / "bert")
    capture = Capture(model, list(model.get_submodule("encoder.layer").children()))
    with pytest.raises(InputError, match=r"BertModel cannot be run .*\(input_ids \[1, 70\]\).*--seq-len"):
        capture.run(tokens((1, 70), padded=False))  # longer than the positions there are


def test_a_block_that_returns_no_tensor() -> None:
    with pytest.raises(InputError, match="returns dict, not a tensor"):
        Call(torch.zeros(1)).run(lambda _: {"hidden": 1})
    assert torch.equal(
        Call(torch.ones(1), (2,), {"c": 3}).run(lambda a, b, *, c: (a * b * c, None)), torch.tensor([6.0])
    )


class Counting(nn.Module):
    """Counts its calls; with ``more`` it returns a tuple."""

    def __init__(self, *, more: bool) -> None:
        super().__init__()
        self.more, self.count = more, 0

    def forward(self, values: Tensor) -> Any:
        self.count += 1
        return (values + 1, self.count) if self.more else values + 1


@pytest.mark.parametrize(("more", "runs"), [(False, 1), (True, 3)])
def test_the_first_block_runs_no_more_than_needed(more: bool, runs: int) -> None:
    model = Chain([0, 1, 2])
    model.layers = nn.ModuleList([Counting(more=more), nn.Identity(), nn.Identity()])
    capture = Capture(model, list(model.layers))
    found = [capture.run({"values": torch.full((2, 4), float(number))}) for number in range(3)]
    assert model.layers[0].count == runs
    assert [float(each.hidden.mean()) for each in found] == [0.0, 1.0, 2.0]
    assert [each.returned for each in found] == ([(1,), (2,), (3,)] if more else [None] * 3)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.zeros(2), False),
        (torch.ones(2), torch.ones(3), False),
        (torch.ones(2), None, False),
        (None, None, True),
        ((1, [torch.ones(2)]), (1, [torch.ones(2)]), True),
        ((1, [torch.ones(2)]), (1, [torch.zeros(2)]), False),
        ((1,), (1, 2), False),
        ({"a": torch.ones(2)}, {"a": torch.ones(2)}, True),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, False),
        ({"a": torch.ones(2)}, {"a": torch.zeros(2)}, False),
        (Arguments((1,), {"a": 2}), Arguments((1,), {"a": 2}), True),
        (Arguments((1,), {"a": 2}), Arguments((1,), {"a": 3}), False),
        (Arguments((1,), {"a": 2}), Arguments((2,), {"a": 2}), False),
    ],
)
def test_alike(one: Any, other: Any, expected: bool) -> None:
    assert alike(one, other) is expected
