"""Gates: what is a requirement, and when it holds."""

from __future__ import annotations

import pytest

from quantcli.errors import UsageError
from quantcli.reporting.gates import apply_gates, parse_gates
from quantcli.reporting.report import ModelRow, Report

KNOWN = ("top1", "kl_nats", "size_ratio")


def row(path: str = "c", **metrics: float | None) -> ModelRow:
    return ModelRow(path, "candidate", metrics=dict(metrics))


@pytest.mark.parametrize(
    ("text", "below", "equal", "above"),
    [
        ("kl_nats < 0.5", True, False, False),
        ("kl_nats <= 0.5", True, True, False),
        ("kl_nats == 0.5", False, True, False),
        ("kl_nats >= 0.5", False, True, True),
        ("kl_nats > 0.5", False, False, True),
    ],
)
def test_operators_mean_what_they_say(text: str, below: bool, equal: bool, above: bool) -> None:
    gates = parse_gates([text], KNOWN)
    values = (0.25, 0.5, 0.75)
    assert [apply_gates(gates, [row(), row(kl_nats=value)])[0].passed for value in values] == [below, equal, above]


@pytest.mark.parametrize(
    ("text", "metric", "bound"),
    [
        ("top1>=0.9", "top1", 0.9),
        ("  top1_drop   <=  -1e-2 ", "top1_drop", -0.01),
        ("size_ratio <= +.3", "size_ratio", 0.3),
        ("kl_nats < 1E3", "kl_nats", 1000.0),
    ],
)
def test_expressions(text: str, metric: str, bound: float) -> None:
    (gate,) = parse_gates([text], KNOWN)
    assert (gate.metric, gate.bound, gate.text) == (metric, bound, text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("top1", "is not METRIC OP NUMBER"),
        ("top1 => 0.9", "is not METRIC OP NUMBER"),
        ("0.9 <= top1", "is not METRIC OP NUMBER"),
        ("top1 >= 0.9 extra", "is not METRIC OP NUMBER"),
        ("top1 >= nan", "is not METRIC OP NUMBER"),
        ("top1 >= 1.2.3", "'1.2.3' is not a number"),
        ("top2 >= 0.9", "unknown metric 'top2'.*Known: kl_nats, size_ratio, top1; each also with _drop"),
        ("top2_drop >= 0.9", "unknown metric 'top2_drop'"),
    ],
)
def test_what_is_no_requirement_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_gates([text], KNOWN)


@pytest.mark.parametrize("text", ["top1_drop <= 0.1", "size_ratio <= 1"])
def test_a_model_alone_is_not_compared_with_itself(text: str) -> None:
    assert parse_gates([text], KNOWN)[0].text == text
    with pytest.raises(UsageError, match="only one is given") as refused:
        parse_gates([text], KNOWN, alone=True)
    assert "CANDIDATE" in str(refused.value.hint)
    assert parse_gates(["top1 >= 0.9"], KNOWN, alone=True)


def test_a_users_own_metric_may_be_called_a_drop() -> None:
    assert parse_gates(["rain_drop < 3"], ["rain_drop"], alone=True)


def test_metrics_of_a_task_of_the_users_own_are_not_known_before() -> None:
    assert parse_gates(["anything > 1"], None)[0].metric == "anything"


def test_a_drop_is_the_reference_minus_the_candidate() -> None:
    (gate,) = apply_gates(parse_gates(["top1_drop <= 0.125"], KNOWN), [row(top1=0.75), row(top1=0.5)])
    assert (gate.value, gate.passed) == (0.25, False)
    (gate,) = apply_gates(parse_gates(["top1_drop <= 0.125"], KNOWN), [row(top1=0.5), row(top1=0.75)])
    assert (gate.value, gate.passed) == (-0.25, True)


def test_a_metric_that_is_called_drop_is_taken_as_it_is() -> None:
    (gate,) = apply_gates(parse_gates(["rain_drop < 3"], None), [row(rain=9), row(rain=1, rain_drop=2)])
    assert (gate.value, gate.passed) == (2, True)


@pytest.mark.parametrize("text", ["top1 >= 0", "top1 < 9", "top1_drop <= 1"])
def test_what_was_not_measured_does_not_pass(text: str) -> None:
    gates = parse_gates([text], KNOWN)
    for models in ([row(top1=None), row(top1=None)], [row(), row()], [row(top1=0.5), row()]):
        (gate,) = apply_gates(gates, models)
        assert (gate.value, gate.passed) == (None, False)


def test_every_gate_is_for_every_candidate_or_for_a_model_that_stands_alone() -> None:
    gates = parse_gates(["top1 >= 0.5", "kl_nats < 1"], KNOWN)
    reference = row("r", top1=0.1)
    candidates = [row("a", top1=0.6, kl_nats=0.1), row("b", top1=0.4, kl_nats=0.1)]
    rows = apply_gates(gates, [reference, *candidates])
    assert [(gate.require, gate.model, gate.passed) for gate in rows] == [
        ("top1 >= 0.5", "a", True),
        ("top1 >= 0.5", "b", False),
        ("kl_nats < 1", "a", True),
        ("kl_nats < 1", "b", True),
    ]
    assert not Report("eval", [reference, *candidates], gates=rows).passed
    assert [gate.model for gate in apply_gates(gates[:1], [reference])] == ["r"]
