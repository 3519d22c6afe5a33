"""Reports as tables for people: alike layers in one row, sizes and ratios in units."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from quantcli.reporting.report import Bars, LayerRow, ModelRow, Report, Table
from quantcli.system.text import format_bytes

#: Columns of names, and what separates the parts of a name.
LAYER_NAMES = {"Layer": "/._", "Name": "/._", "Tensor": "/._"}
MODEL_NAMES = {"Model": "/"}
#: Where the bar of an error is empty.
_CLEAN_DB = 50.0
SIZES = frozenset({"Before", "After", "Size", "SQNR", "Ratio", "Tensors", "Value"})
_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=[./])")
_ANY_NUMBER = re.compile(r"\d+")
#: More rows than this are too many to read, if their names differ in numbers only.
_MANY_ROWS = 24


def ratio_text(value: float) -> str:
    """0.25 -> ``0.250``."""
    return f"{value:.3f}"


def gate_table(report: Report) -> Table:
    """One row per gate."""
    names, folder = short_names(report.models)
    rows = [
        (
            gate.require,
            names.get(gate.model, gate.model),
            "none" if gate.value is None else f"{gate.value:.6g}",
            "passed" if gate.passed else "FAILED",
        )
        for gate in report.gates
    ]
    return Table(f"Gates{folder}", ("Require", "Model", "Value", "Result"), rows, SIZES, names=MODEL_NAMES)


def is_shown(name: str) -> bool:
    """Whether a metric has a column of its own: standard errors and sizes stand in others."""
    return not name.endswith("_se") and not name.startswith("size_")


def total_sizes(rows: Iterable[LayerRow]) -> tuple[str, str]:
    """Sizes of all rows together, before and after."""
    rows = list(rows)
    return format_bytes(sum(row.bytes_before for row in rows)), format_bytes(sum(row.bytes_after for row in rows))


def error_bars(values: Iterable[float | None]) -> Bars:
    """Errors as bars on one scale for all tables, so that tables can be compared."""
    shares = [None if value is None else min(max(1 - value / _CLEAN_DB, 0.0), 1.0) for value in values]
    meaning = f"Error: full at 0 dB, where noise is as strong as the signal; empty at {_CLEAN_DB:g} dB."
    return Bars("Error", shares, meaning)


def counted_text(number: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass(frozen=True)
class Alike:
    """Layers whose names differ in numbers only, as one row: ``model.layers.{0-29}.mlp.up_proj x 30``."""

    name: str
    rows: Sequence[LayerRow]
    #: What each layer's name has where others have other numbers.
    numbers: Sequence[str]

    @property
    def worst_sqnr_db(self) -> float | None:
        """The least signal to noise; None where nothing was lost or measured."""
        return min((row.sqnr_db for row in self.rows if row.sqnr_db is not None), default=None)

    @property
    def worst(self) -> str:
        """Which of the layers has the least signal to noise, by its numbers; empty for one alone."""
        measured = [row.sqnr_db for row in self.rows]
        known = [value for value in measured if value is not None]
        return self.numbers[measured.index(min(known))] if known and len(self.rows) > 1 else ""


def collapse(rows: Sequence[LayerRow], key: Callable[[LayerRow], object]) -> list[Alike]:
    """Rows that differ in layer numbers only, together: ``model.layers.{0-29}.mlp.up_proj x 30``.

    Where that leaves many, those that differ in any number: ``conv2d_{10-184}.w_0 x 37``. Groups come in the order of
    their first members.
    """
    groups = _group(rows, key, _LAYER_NUMBER)
    return groups if len(groups) <= _MANY_ROWS else _group(rows, key, _ANY_NUMBER)


def _group(rows: Sequence[LayerRow], key: Callable[[LayerRow], object], number: re.Pattern[str]) -> list[Alike]:
    groups: dict[tuple[str, object], list[LayerRow]] = {}
    for row in rows:
        groups.setdefault((number.sub("#", row.name), key(row)), []).append(row)
    return [_alike(members, number) for members in groups.values()]


def _alike(members: Sequence[LayerRow], number: re.Pattern[str]) -> Alike:
    """Members that are alike but for their numbers, under one name."""
    first = members[0].name
    if len(members) == 1:
        return Alike(first, members, [""])
    columns = list(zip(*(number.findall(row.name) for row in members), strict=True))
    ranges = iter([column[0] if len(set(column)) == 1 else _range(column) for column in columns])
    varying = [column for column in columns if len(set(column)) > 1]
    numbers = [", ".join(found) for found in zip(*varying, strict=True)] or [""] * len(members)
    return Alike(f"{number.sub(lambda _: next(ranges), first)} x {len(members)}", members, numbers)


def _range(numbers: Iterable[str]) -> str:
    values = [int(number) for number in numbers]
    return f"{{{min(values)}-{max(values)}}}"


def scheme_text(model: ModelRow, report: Report) -> str:
    """Format and scheme of a model; the scheme alone where all models are of one format."""
    alike = len({one.format for one in report.models}) == 1
    return " ".join(filter(None, (None if alike and model.scheme else model.format, model.scheme)))


def short_names(models: Sequence[ModelRow]) -> tuple[dict[str, str], str]:
    """Paths without the folder that all models share, and that folder for a title, or nothing where there is none."""
    paths = [model.path for model in models]
    parents = [str(PurePath(path).parent) for path in paths]
    relative = any(PurePath(path).is_absolute() != PurePath(paths[0]).is_absolute() for path in paths)
    folder = "" if len(paths) < 2 or relative else os.path.commonpath(parents)
    if folder in ("", ".", PurePath(folder).anchor) or "." in parents:
        return {path: path for path in paths}, ""
    return {path: str(PurePath(path).relative_to(folder)) for path in paths}, f", models in {folder}"
