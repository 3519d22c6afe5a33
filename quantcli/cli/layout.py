"""How a table fits a terminal: names are shortened in their middle, text is wrapped at words, the rest goes below.

Nothing is broken inside a word, and the last part of a name, which tells layers apart, always stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from quantcli.reporting.report import Table

#: Columns are this far apart: rather closer together than folded.
GAPS = (3, 2)
#: Left and right of a line.
_EDGES = 2
_GAP = "..."
#: Eighths of a character, and what stands for them where there are none.
_BLOCKS = " ▏▎▍▌▋▊▉█"
_BAR_WIDTH = 8
#: A number with its error stays whole, and so does an interval.
_NUMBERS = re.compile(r" (?=\+-)")
_WORD = re.compile(r"\[[^\]]*\]\S*|\S+")
#: How many rows one stands for.
_COUNT = re.compile(r" x \d+$")
_DIGITS = re.compile(r"\d")

Measure = Callable[[str], int]


@dataclass(frozen=True)
class Column:
    """A column as it is shown: lines of a cell are separated by line breaks. ``parts``: what separates a name's."""

    head: str
    cells: Sequence[str]
    right: bool = False
    parts: str = ""


def fit(table: Table, width: int, *, measure: Measure = len, blocks: bool = True) -> tuple[list[list[Column]], int]:
    """A table's columns for ``width`` characters, in one block or in several below each other, and their gap.

    Every block begins with the table's first column. ``measure`` tells how wide a text is; ``blocks`` whether the
    terminal has block characters for bars.
    """
    columns = _columns(table, blocks)
    natural = [_width(column, measure) for column in columns]
    for gap in GAPS:
        if _total(natural, gap) <= width:
            return [columns], gap
    return [_narrowed(block, width, measure) for block in _split(columns, width, measure)], GAPS[-1]


def bar_text(share: float | None, *, blocks: bool) -> str:
    """A bar that is full at 1; empty where there is nothing to show."""
    filled = 0.0 if share is None else min(max(share, 0.0), 1.0) * _BAR_WIDTH
    if not blocks:
        return "#" * round(filled)
    whole, eighths = divmod(round(filled * 8), 8)
    return (_BLOCKS[-1] * whole + _BLOCKS[eighths]).rstrip()


def shortened(names: Sequence[str], width: int, separators: str) -> list[str]:
    """Names in at most ``width`` characters where that can be: parts of their middle give way to dots.

    The last part stays, and so do parts without which two names would look the same. Of the others, in this order:
    those that not all names have, numbers, the first, the last.
    """
    found = [_Name.of(name, separators) for name in names]
    common = frozenset.intersection(*(frozenset(name.parts) for name in found)) if found else frozenset()
    orders = [name.order(common) for name in found]
    most, different = max(map(len, orders), default=0), len(set(names))

    def distinct(count: int) -> int:
        return len({name.form(order[:count]) for name, order in zip(found, orders, strict=True)})

    needed = next((count for count in range(most) if distinct(count) == different), most)
    return [name.within(width, order, needed) for name, order in zip(found, orders, strict=True)]


@dataclass(frozen=True)
class _Name:
    """A name in parts. ``ending``: how many rows it stands for."""

    text: str
    parts: tuple[str, ...]
    separator: str
    ending: str

    @classmethod
    def of(cls, text: str, separators: str) -> _Name:
        count = _COUNT.search(text)
        ending = count.group() if count else ""
        stem = text.removesuffix(ending)
        separator = next((one for one in separators if one in stem.strip(one)), "")
        return cls(text, tuple(stem.split(separator)) if separator else (stem,), separator, ending)

    def order(self, common: frozenset[str]) -> list[int]:
        """Parts but the last, those that tell most first."""

        def rank(index: int) -> tuple[bool, bool, bool, int]:
            part = self.parts[index]
            return part in common, not _DIGITS.search(part), index > 0, -index

        return sorted(range(len(self.parts) - 1), key=rank)

    def form(self, kept: Collection[int]) -> str:
        """The name with dots for every gap between the parts that are kept."""
        text, last = "", -1
        for index in sorted({*kept, len(self.parts) - 1}):
            text += (_GAP if index - last > 1 else self.separator if text or index else "") + self.parts[index]
            last = index
        return text + self.ending

    def within(self, width: int, order: Sequence[int], needed: int) -> str:
        """The name with the ``needed`` first parts of an order, and of the others what fits."""
        if len(self.text) <= width:
            return self.text
        kept = set(order[:needed])
        for index in order[needed:]:
            if len(self.form(kept | {index})) <= width:
                kept.add(index)
        return self.form(kept)


def _columns(table: Table, blocks: bool) -> list[Column]:
    cells = list(zip(*table.rows, strict=True)) or [()] * len(table.columns)
    columns = [
        Column(name, texts, name in table.right, table.names.get(name, ""))
        for name, texts in zip(table.columns, cells, strict=True)
    ]
    if table.bars is not None:
        columns.append(Column(table.bars.name, [bar_text(share, blocks=blocks) for share in table.bars.shares]))
    return columns


def _total(widths: Sequence[int], gap: int) -> int:
    return sum(widths) + gap * (len(widths) - 1) + _EDGES


def _width(column: Column, measure: Measure) -> int:
    return max(measure(line) for cell in (column.head, *column.cells) for line in cell.split("\n"))


def _split(columns: Sequence[Column], width: int, measure: Measure) -> Iterator[list[Column]]:
    """As many columns in each block as fit when they are narrow; the first begins every block."""
    first, *others = columns
    block, used = [first], _least(first, measure) + _EDGES
    start = used
    for column in others:
        more = _least(column, measure) + GAPS[-1]
        if len(block) > 1 and used + more > width:
            yield block
            block, used = [first], start
        block.append(column)
        used += more
    yield block


def _narrowed(columns: Sequence[Column], width: int, measure: Measure) -> list[Column]:
    """Columns of a block, the widest narrowed until all fit, as far as each can be."""
    widths = [_width(column, measure) for column in columns]
    least = [_least(column, measure) for column in columns]
    while _total(widths, GAPS[-1]) > width:
        candidates = [index for index, one in enumerate(widths) if one > least[index]]
        if not candidates:
            break
        widths[max(candidates, key=lambda index: widths[index])] -= 1
    shown = [_folded(column, limit, measure) for column, limit in zip(columns, widths, strict=True)]
    # Words seldom fill a line: what they leave is the names'.
    left = width - _total([_width(column, measure) for column in shown], GAPS[-1])
    for index, column in enumerate(columns):
        if column.parts and left > 0:
            before = _width(shown[index], measure)
            shown[index] = _folded(column, before + left, measure)
            left -= _width(shown[index], measure) - before
    return shown


def _least(column: Column, measure: Measure) -> int:
    """The least width that keeps words and last parts of names whole."""
    return _width(_folded(column, 0, measure), measure)


def _folded(column: Column, width: int, measure: Measure) -> Column:
    """A column for ``width`` characters, or as near as can be."""
    if column.parts:
        cells = shortened(column.cells, width, column.parts)
    else:
        cells = [_wrapped(_pieces(cell, column.right), width, measure) for cell in column.cells]
    return replace(column, head=_wrapped(column.head.split(" "), width, measure), cells=cells)


def _pieces(text: str, number: bool) -> list[str]:
    return _NUMBERS.split(text) if number else _WORD.findall(text)


def _wrapped(words: Sequence[str], width: int, measure: Measure) -> str:
    """Words in lines of at most ``width``, but for a word that is longer."""
    lines = [""]
    for word in words:
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and measure(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
