"""How budgets are read from a command line."""

from __future__ import annotations

import pytest

from quantcli.errors import MissingExtraError, UsageError
from quantcli.search.budget import Budget, parse_allow, parse_milliseconds, parse_seconds


@pytest.mark.parametrize(("text", "expected"), [("5ms", 5.0), ("0.25s", 250.0), ("7", 7.0), ("1.5 ms", 1.5)])
def test_milliseconds(text: str, expected: float) -> None:
    assert parse_milliseconds(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("90s", 90.0), ("10m", 600.0), ("1h", 3600.0), ("45", 45.0)])
def test_seconds(text: str, expected: float) -> None:
    assert parse_seconds(text) == expected


@pytest.mark.parametrize("text", ["", "ms", "-5ms", "0", "5 apples", "nan", "inf"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no length of time"):
        parse_milliseconds(text)


def test_schemes_that_may_be_chosen() -> None:
    assert parse_allow("int4, int8,float,int8") == ("int4", "int8", "float")
    with pytest.raises(UsageError, match="unknown scheme 'int9'"):
        parse_allow("int9,int8")
    with pytest.raises(UsageError, match="at least two"):
        parse_allow("int8")


def test_what_may_be_chosen_where_nothing_is_named() -> None:
    budget = Budget(max_size=1)
    assert budget.checked(onnx=False, data=True).allow == ("int4", "int8", "bf16")
    assert budget.checked(onnx=True, data=True).allow == ("float", "int8-static", "int8-dynamic", "int4")
    assert "int8-static" not in budget.checked(onnx=True, data=False).allow


def test_without_scipy_a_budget_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcli.search.budget.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"quantcli\[search\]"):
        Budget(max_size=1).checked(onnx=False, data=True)
