"""One batch on its way through a block: whose rows are whose, and in which precision it goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantcli.blocks.calls import Call

SAMPLES, TOKENS, HEADS = 4, 3, 2


def call(**kwargs: Any) -> Call:
    return Call(torch.randn(SAMPLES, TOKENS, 8), kwargs=kwargs)


def test_a_sample_takes_the_rows_of_all_its_heads() -> None:
    alibi = torch.arange(SAMPLES * HEADS, dtype=torch.float32).reshape(-1, 1, 1).expand(-1, 1, TOKENS)
    whole = Call(torch.randn(SAMPLES, TOKENS, 8), kwargs={"alibi": alibi}, per_sample={"alibi": HEADS})
    part = whole.rows([2, 0])
    assert part.kwargs["alibi"][:, 0, 0].tolist() == [4, 5, 0, 1]
    assert torch.equal(part.hidden, whole.hidden[[2, 0]])


def test_what_is_known_to_be_shared_stays_whole() -> None:
    table = torch.randn(SAMPLES, TOKENS)
    shared = Call(torch.randn(SAMPLES, TOKENS, 8), args=(table,), per_sample={0: 0})
    assert torch.equal(shared.rows([1]).args[0], table)
    assert torch.equal(Call(shared.hidden, args=(table,)).rows([1]).args[0], table[[1]])


def test_all_that_floats_goes_in_float32() -> None:
    half, ids = torch.randn(SAMPLES, TOKENS, dtype=torch.bfloat16), torch.arange(TOKENS)
    given = Call(
        half[..., None], (half, [half]), {"states": {"left": half}, "ids": ids, "mask": ids > 1}, {"states": 0}
    )
    wide = given.in_float32()

    def dtypes(value: Any) -> list[torch.dtype]:
        if isinstance(value, Tensor):
            return [value.dtype]
        return [each for part in (value.values() if isinstance(value, dict) else value) for each in dtypes(part)]

    assert dtypes([wide.hidden, wide.args]) == [torch.float32] * 3
    assert dtypes(wide.kwargs) == [torch.float32, torch.int64, torch.bool]
    assert wide.per_sample == {"states": 0}
    assert given.args[0].dtype == torch.bfloat16
