"""The writer: a weight given as a whole and one that comes in slabs end as the same bytes and the same checksums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.outputs import NORM, WEIGHT, tensors, under_way

from quantcli import algorithms
from quantcli.algorithms.base import by_rows
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.conversion.checkpoint import writer
from quantcli.conversion.checkpoint.writer import LayerResult, read_codes, slabs, write_codes, write_values
from quantcli.core.tensors import RoundedTensor, Rounding
from quantcli.errors import InputError

GROUPS = {"weights": {"dtype": "int4", "granularity": "group", "group_size": 32, "symmetric": False}}
RECIPES: list[dict[str, Any]] = [
    {"scheme": "int8", "algorithm": "rtn"},
    {"scheme": GROUPS, "algorithm": "rtn"},
    {"scheme": GROUPS, "format": "gptq", "algorithm": "rtn"},
    {"scheme": GROUPS, "format": "awq", "algorithm": "rtn"},
    {"scheme": "nf4", "algorithm": "rtn"},
    {"scheme": "nf4-double", "algorithm": "rtn"},
]


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SLAB_ELEMENTS", 1024)


def rounded(plan: Any, layer: Any) -> RoundedTensor:
    """The weight as a whole, by the algorithm of its plan."""
    dtype = getattr(torch, {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[plan.scale_dtype])
    run = algorithms.rounding(layer.algorithm).run
    return RoundedTensor(by_rows(run, tensors()[WEIGHT], layer.scheme.weights, dtype), Rounding(layer.algorithm))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_whole_weight_is_written_as_slabs_of_it_are(tmp_path: Path, recipe: dict[str, Any]) -> None:
    streamed, whole = under_way(tmp_path / "streamed", **recipe), under_way(tmp_path / "whole", **recipe)
    layer = whole.layer(WEIGHT)
    by_slabs = streamed.stream(WEIGHT)
    at_once = write_codes(layer, rounded(whole.plan, layer), whole.plan, whole.destinations)
    assert streamed.file.read_bytes() == whole.file.read_bytes()
    assert len(by_slabs.checksums) == len(slabs(layer))
    assert (by_slabs.checksums, by_slabs.scales_checksum) == (at_once.checksums, at_once.scales_checksum)
    assert by_slabs.others_checksum == at_once.others_checksum
    assert by_slabs.rounding.algorithm == "rtn" and by_slabs.rounding.noise > 0


@pytest.mark.parametrize("recipe", RECIPES[:-1], ids=str)
def test_what_was_written_is_read_back(tmp_path: Path, recipe: dict[str, Any]) -> None:
    output = under_way(tmp_path / "out", **recipe)
    layer = output.layer(WEIGHT)
    given = rounded(output.plan, layer).tensor
    write_codes(layer, RoundedTensor(given, Rounding("rtn")), output.plan, output.destinations)
    stored = read_codes(layer, output.plan, open_checkpoint(output.file))
    assert torch.equal(stored.codes, given.codes) and torch.equal(stored.scale, given.scale)
    assert (stored.zero_point is None) == (given.zero_point is None)
    assert given.zero_point is None or torch.equal(stored.zero_point, given.zero_point)


def test_values_are_written_as_they_are_planned(tmp_path: Path) -> None:
    output = under_way(tmp_path / "out", scheme="int8", rest="bf16")
    values = torch.linspace(-3, 3, 128)
    result = write_values(output.layer(NORM), values, output.destinations)
    assert torch.equal(load_file(output.file)[NORM], values.bfloat16())
    streamed = under_way(tmp_path / "streamed", scheme="int8", rest="bf16")
    assert result.checksums != streamed.stream(NORM).checksums
    assert write_values(streamed.layer(NORM), tensors()[NORM], streamed.destinations) == LayerResult(
        streamed.stream(NORM).checksums
    )


def test_what_does_not_fit_its_dtype_is_refused(tmp_path: Path) -> None:
    output = under_way(tmp_path / "out", scheme="int8", rest="fp16")
    with pytest.raises(InputError, match=f"{NORM} has values too large for F16"):
        write_values(output.layer(NORM), torch.full((128,), 1e6), output.destinations)
    layer = output.layer(WEIGHT)
    given = rounded(output.plan, layer)
    given.tensor.scale[0] = torch.inf
    with pytest.raises(InputError, match=f"{WEIGHT} has values too large for scales"):
        write_codes(layer, given, output.plan, output.destinations)


@pytest.mark.parametrize("note", [None, "no token seen"])
def test_the_journal_gives_a_result_back(note: str | None) -> None:
    result = LayerResult([1, 2], 3, 4, Rounding("mse", note, 5.0, 0.5, 7))
    record = json.loads(json.dumps(result.to_json()))
    assert LayerResult.from_json({"name": "w", **record}) == result
    assert list(record) == [
        "checksums", "scales_checksum", "others_checksum", "signal", "noise", "algorithm", "note", "tokens",
    ]  # fmt: skip
