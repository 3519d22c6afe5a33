"""Sizes and durations as people write and read them."""

from __future__ import annotations

import pytest

from quantcli.system.text import first_line, format_bytes, format_seconds, listed, parse_bytes, suggestion


@pytest.mark.parametrize(
    ("text", "count"), [("80MB", 80_000_000), ("1.5GiB", 1_610_612_736), ("12", 12), ("3 kB", 3000), ("2g", 2 * 10**9)]
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "MB", "1.2.3MB", "-5MB", "5 parsecs", "inf"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="80MB"):
        parse_bytes(text)


def test_units_for_people() -> None:
    assert [format_bytes(count) for count in (12, 1500, 999_600_000, 1_610_612_736)] == [
        "12 B",
        "1.5 kB",
        "1 GB",
        "1.61 GB",
    ]
    assert [format_seconds(seconds) for seconds in (0.25, 42.4, 75, 7300)] == [
        "0.25 s",
        "42 s",
        "1 min 15 s",
        "2 h 1 min",
    ]


def test_errors_are_told_by_their_first_line() -> None:
    assert first_line(ValueError("  one.\ntwo")) == "one"
    assert first_line(ValueError("x" * 999)) == "x" * 300
    assert first_line(ValueError()) == "ValueError()"


def test_names_are_listed_and_guessed() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed([*"abcdef"]) == "a, b, c, d and 2 more"
    assert suggestion("int9", ["int8", "nf4"]) == "Did you mean 'int8'?"
    assert suggestion("zzz", ["int8", "nf4"]) == "Known: int8, nf4."
