"""Tables in narrow terminals: nothing is broken inside a word, and names keep what tells them apart."""

from __future__ import annotations

import io
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.cli.layout import bar_text, fit, shortened
from quantcli.cli.terminal import Ui
from quantcli.reporting.report import LayerRow, ModelRow, Report, Table
from quantcli.reporting.tables.common import LAYER_NAMES, error_bars
from quantcli.reporting.tables.evaluate import eval_tables

PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
WIDTHS = (60, 80, 120)


def layerwise() -> Report:
    """Two candidates of a language model with thirty blocks, layer by layer."""
    metrics = {"perplexity": 15.5, "perplexity_se": 1.497, "kl_nats": 0.355, "kl_nats_se": 0.02, "size_ratio": 0.21}
    models = [ModelRow("models/smol", "reference", "safetensors", "fp32", size_bytes=538_000_000, metrics=metrics)]
    layers = []
    for path in ("models/smol-int4", "models/smol-gptq-with-a-long-name"):
        models.append(ModelRow(path, "candidate", "compressed-tensors", "int4", None, 113_000_000, dict(metrics)))
        layers += [
            LayerRow(f"model.layers.{i}.{name}", "int4, group 64", 1_330_000, 176_000, 2.0 + i / 3, model=path)
            for name in PROJECTIONS
            for i in range(30)
        ]
    return Report("eval", models, layers, details={"samples": 4, "data": "prose.txt", "task": "language-modeling"})


def shown(report: Report, width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    Ui().show(report, eval_tables(report))
    stream.seek(0)
    return stream.read()


@pytest.mark.parametrize("width", WIDTHS)
def test_layers_of_a_language_model_fit_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(layerwise(), width, monkeypatch)
    assert max(map(len, text.splitlines())) <= width
    assert len(text.splitlines()) < 90  # of 240 layers
    words = set(re.findall(r"\S+", text))
    for name in PROJECTIONS:
        last = name.split(".")[-1]
        assert any(word.endswith(last) for word in words), name
    assert "compressed-tensors" in words
    assert "█" in text


def test_a_wide_terminal_shows_names_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(layerwise(), 120, monkeypatch)
    assert "model.layers.{0-29}.self_attn.o_proj x 30" in text
    assert "..." not in text


def test_names_lose_their_middle() -> None:
    names = ["model.layers.17.mlp.down_proj", "model.layers.3.self_attn.o_proj"]
    assert shortened(names, 80, "/._") == names
    assert shortened(names, 26, "/._") == ["model...17.mlp.down_proj", "model...3.self_attn.o_proj"]
    assert shortened(names, 0, "/._") == ["...down_proj", "...o_proj"]
    # A file's suffix is not its last part.
    assert shortened(["a/very/long/way/to/net.onnx"], 14, "/") == ["a...net.onnx"]
    assert shortened(["net.onnx"], 3, "/") == ["net.onnx"]
    assert shortened([], 3, "/") == []


def test_names_stay_different_however_narrow() -> None:
    names = [f"model.layers.{{0-29}}.{name}.weight x 30" for name in PROJECTIONS]
    assert shortened(names, 10, "/._") == [f"...{name.split('.')[1]}.weight x 30" for name in PROJECTIONS]


parts = st.sampled_from(["model", "layers", "0", "17", "{0-29}", "mlp", "q_proj", "weight", "a_long_name_of_a_part"])


@settings(deadline=None)
@given(st.lists(st.lists(parts, min_size=1, max_size=5).map(".".join), min_size=1, max_size=6), st.integers(0, 40))
def test_short_names_are_as_many_as_long_ones(names: list[str], width: int) -> None:
    short = shortened(names, width, "/.")
    assert len(set(short)) == len(set(names))
    for before, after in zip(names, short, strict=True):
        assert after.split(".")[-1] == before.split(".")[-1]
        if len(before) <= width:
            assert after == before


words = st.lists(st.sampled_from(["a", "word", "or", "several", "longer-ones"]), min_size=1, max_size=6).map(" ".join)


@settings(deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(24, 90))
def test_no_word_is_broken_and_no_cell_is_lost(data: st.DataObject, count: int, width: int) -> None:
    head = [f"c{i}" for i in range(count)]
    rows = data.draw(st.lists(st.tuples(*[words] * count), min_size=1, max_size=4))
    blocks, gap = fit(Table("T", head, rows), width)
    assert [column.head for column in blocks[0]][:1] == ["c0"]
    told = [column for number, block in enumerate(blocks) for column in block[1 if number else 0 :]]
    assert [column.head for column in told] == head
    for index, column in enumerate(told):
        assert [cell.replace("\n", " ") for cell in column.cells] == [row[index] for row in rows]
    for block in blocks:
        lines = [max(len(line) for cell in (c.head, *c.cells) for line in cell.split("\n")) for c in block]
        assert len(block) <= 2 or sum(lines) + gap * (len(lines) - 1) + 2 <= width


def test_numbers_keep_their_units_and_their_errors() -> None:
    row = ("m", "99.83% +- 0.17%", "31.3 dB", "15.58x [2.82, 23.72] faster")
    table = Table("T", ("Model", "Top-1", "SQNR", "Speed-up"), [row], frozenset({"Top-1", "SQNR"}))
    (block,), _ = fit(table, 44)
    cells = [column.cells[0] for column in block]
    assert cells == ["m", "99.83%\n+- 0.17%", "31.3 dB", "15.58x\n[2.82, 23.72]\nfaster"]


def test_bars_are_as_fine_as_the_terminal_allows() -> None:
    assert [bar_text(share, blocks=True) for share in (None, 0.0, 0.5, 0.52, 1.0, 7.0)] == [
        "", "", "████", "████▏", "████████", "████████",
    ]  # fmt: skip
    assert [bar_text(share, blocks=False) for share in (None, 0.0, 0.5, 1.0)] == ["", "", "####", "########"]
    table = Table("T", ("Layer",), [("a.b",), ("c.d",)], names=LAYER_NAMES, bars=error_bars([0.0, None]))
    (block,), _ = fit(table, 80, blocks=False)
    assert [(column.head, list(column.cells)) for column in block] == [
        ("Layer", ["a.b", "c.d"]), ("Error", ["########", ""]),
    ]  # fmt: skip


def test_a_table_without_rows_has_its_head() -> None:
    (block,), gap = fit(Table("T", ("Layer", "Size"), []), 80)
    assert ([column.head for column in block], gap) == (["Layer", "Size"], 3)
