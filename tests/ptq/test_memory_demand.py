"""Memory of the heaviest block, foreseen: against sums made by hand, and refused where there is too little."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers as tf
from support.plain_blocks import token_file

from quantcli import convert
from quantcli.blocks.skeleton import open_skeleton
from quantcli.blocks.structure import find_blocks
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.errors import InputError, UsageError
from quantcli.planning.recipe import Recipe
from quantcli.planning.resolve import resolve
from quantcli.ptq.block import linear_layers
from quantcli.ptq.memory_demand import Demand, foresee

#: Of the tiny llama: two rows of 10 tokens; q, k, v and o; gate, up and down; two norms.
TOKENS = 20
SHAPES = [(128, 128), (64, 128), (64, 128), (128, 128), (192, 128), (192, 128), (128, 192)]
BLOCK = sum(rows * columns for rows, columns in SHAPES) + 2 * 128


def foreseen(folder: Path, steps: list[Any]) -> Demand:
    checkpoint = open_checkpoint(folder)
    recipe = Recipe(scheme="int4", group_size=16, steps=steps)
    plan = resolve(recipe, checkpoint.infos(), checkpoint.config, data=True)
    skeleton = open_skeleton(checkpoint)
    lists = find_blocks(skeleton.module, linear_layers(skeleton, plan))
    batches = [{"input_ids": torch.zeros(2, 10)}, {"input_ids": torch.zeros(1, 5)}]
    return foresee(skeleton, plan, lists, batches)


def test_hessians_and_those_of_some_batches_beside_them(models: Path) -> None:
    """A copy of the largest, which is factored, comes later and takes less than the second set of sums."""
    grams = [columns**2 for _, columns in SHAPES]
    outputs = sorted((rows for rows, _ in SHAPES), reverse=True)
    expected = 2 * BLOCK + 2 * sum(grams) + sum(outputs[:4]) * TOKENS
    assert foreseen(models / "llama", ["gptq"]) == Demand("model.layers.0", round(4.4 * expected))


def test_what_learns_holds_more(models: Path) -> None:
    expected = 6 * BLOCK + sum(rows for rows, _ in SHAPES) * TOKENS
    assert foreseen(models / "llama", ["autoround"]) == Demand("model.layers.0", round(4.4 * expected))


def test_a_large_embedding(tmp_path: Path) -> None:
    sizes = {"vocab_size": 50_000, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)
    block, held = 7 * 32 * 32 + 2 * 32, 4 * 32 * TOKENS
    assert foreseen(tmp_path, ["gptq"]).nbytes == round(4.4 * (block + 50_000 * 32 + held))


def test_the_heaviest_block_counts(models: Path) -> None:
    """A decoder's block has more layers than an encoder's."""
    assert foreseen(models / "bart", ["gptq"]).block == "model.decoder.layers.0"


def test_too_little_memory_is_refused_before_work(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_runtime_check: None
) -> None:
    data = token_file(tmp_path / "ids.npz")
    options: dict[str, Any] = {"data": data, "scheme": "int4", "algorithm": "gptq"}
    taken = psutil.Process().memory_info().rss
    with pytest.raises(UsageError, match=r"--max-memory .* is too little: with model\.layers\.0, its Hessians"):
        convert(models / "llama", tmp_path / "out", max_memory=taken // 2, **options)
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000_000))
        with pytest.raises(InputError, match=r"model\.layers\.0, .* need .* of memory, and 1 MB are free"):
            convert(models / "llama", tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npz"]
    convert(models / "llama", tmp_path / "out", max_memory=2 * taken + (1 << 30), **options)
