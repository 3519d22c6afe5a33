"""What a budget publishes: all that was built, and nothing over what stands there."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantcli.commands.convert_budget import convert_within
from quantcli.errors import UsageError
from quantcli.planning.recipe import Recipe
from quantcli.reporting.report import ModelRow, Report
from quantcli.search.budget import Budget
from quantcli.search.choices import Found


def within(output: Path, limit: int, *, force: bool = False) -> Report:
    """A conversion that writes a graph of 100 bytes with its weights, 1,000 bytes, beside it."""

    def convert_one(recipe: Recipe, place: Path, planned: bool) -> Report:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(bytes(100))
        place.with_name(f"{place.name}.data").write_bytes(bytes(1000))
        return Report("convert", [ModelRow("m", "reference"), ModelRow(str(place), "candidate")])

    def search(budget: Budget) -> Found:
        return Found(Recipe(scheme="int8"), {"chosen": {"size_bytes": 1100}})

    return convert_within(
        "torch.nn:Identity", output, Budget(max_size=limit), search, convert_one, lambda _: {}, dry_run=False,
        force=force,
    )  # fmt: skip


def test_weights_beside_a_single_file_are_published_with_it(tmp_path: Path) -> None:
    report = within(tmp_path / "out.onnx", 2000)
    assert report.passed
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir() if not path.name.endswith(".yaml")} == {
        "out.onnx": 100, "out.onnx.data": 1000
    }  # fmt: skip


def test_weights_beside_a_single_file_count(tmp_path: Path) -> None:
    report = within(tmp_path / "out.onnx", 500)
    assert not report.passed
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_none_of_ours_is_not_replaced(tmp_path: Path) -> None:
    other = tmp_path / "out.onnx.data"
    other.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"out\.onnx\.data exists"):
        within(tmp_path / "out.onnx", 2000)
    assert [path.name for path in tmp_path.iterdir()] == [other.name] and other.read_bytes() == b"mine"
    assert within(tmp_path / "out.onnx", 2000, force=True).passed
    assert len(other.read_bytes()) == 1000


def test_the_output_of_a_function_may_lie_where_one_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert within(Path("out.onnx"), 2000).passed
    with pytest.raises(UsageError, match=r"The output out\.onnx exists"):
        within(Path("out.onnx"), 2000)
