"""``--baseline``: which model of an earlier report is meant, what gates then measure, and what is said of changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_onnx import classifier, weights

import quantcli
from quantcli.benchmarking.probe import Probe
from quantcli.cli.app import main
from quantcli.errors import InputError, UsageError
from quantcli.reporting.baseline import read_baseline
from quantcli.reporting.gates import parse_gates
from quantcli.reporting.report import ModelRow, Report
from quantcli.reporting.tables.baseline import baseline_tables

METRICS = {"top1": 0.9, "kl_nats": None, "size_bytes": 400, "latency_ms_p50": 3.0}


def saved(path: Path, *models: tuple[str, str], command: str = "eval", **details: Any) -> Path:
    rows = [ModelRow(name, role, sha256=name[0] * 64, metrics=dict(METRICS)) for name, role in models]
    path.write_text(Report(command, rows, details=details).to_json())
    return path


@pytest.mark.parametrize(
    ("run", "meant"),
    [
        (("m.onnx", "c.onnx"), ["m.onnx", "c.onnx"]),  # paths, as they were
        (("./m.onnx", "out/../c.onnx"), ["m.onnx", "c.onnx"]),  # the second by its role alone
        (("c.onnx",), ["c.onnx"]),  # the path, in another role
        (("new.onnx", "newer.onnx"), ["m.onnx", "c.onnx"]),  # roles
    ],
)
def test_models_are_compared_with_those_of_the_same_path_or_role(
    run: tuple[str, ...], meant: list[str], tmp_path: Path
) -> None:
    file = saved(tmp_path / "b.json", ("m.onnx", "reference"), ("c.onnx", "candidate"))
    assert [row.path for row in read_baseline(file, "eval", run).models] == meant


def test_the_same_path_twice_is_told_apart_by_role(tmp_path: Path) -> None:
    file = saved(tmp_path / "b.json", ("m", "reference"), ("m", "candidate"), ("o", "candidate"))
    assert [row.role for row in read_baseline(file, "eval", ("m", "m")).models] == ["reference", "candidate"]


def test_a_model_that_could_be_any_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "b.json", ("m", "reference"), ("a", "candidate"), ("b", "candidate"))
    with pytest.raises(UsageError, match=r"no model to compare new with.* It has: m \(reference\), a \(candidate\)"):
        read_baseline(file, "eval", ("m", "new"))
    one = saved(tmp_path / "one.json", ("m", "reference"), ("a", "candidate"))
    with pytest.raises(UsageError, match="no model to compare y with"):
        read_baseline(one, "eval", ("m", "a", "y"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no JSON"),
        ("\0", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "is no report of quantcli"),
        ('{"a": 1}', "is no report of quantcli: schema_version: Field required"),
        ('{"schema_version": 2}', "has schema_version 2, and this quantcli knows 1"),
        (json.dumps({"schema_version": 1, "command": "eval", "quantcli": "0", "models": [{"path": 1}]}), r"models\.0"),
        (json.dumps(Report("bench").to_dict()), "is a report of quantcli bench, and this is eval"),
    ],
)
def test_what_is_no_report_is_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(InputError, match=says):
        read_baseline(tmp_path / "b.json", "eval", ("m",))


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_baseline(tmp_path / "none.json", "eval", ("m",))
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is no JSON"):
        read_baseline(tmp_path / "b.json", "eval", ("m",))


@pytest.mark.parametrize(
    ("gate", "value", "passed"),
    [
        ("top1_drop <= 0.01", 0.9 - 0.85, False),
        ("top1 >= 0.8", 0.85, True),
        ("size_ratio <= 0.5", 0.25, True),
        ("size_bytes_drop >= 300", 300, True),
        ("speedup >= 2", 2.0, True),
        ("latency_ms_p50_drop > 2", 1.5, False),
    ],
)
def test_gates_measure_from_the_baseline(gate: str, value: float, passed: bool, tmp_path: Path) -> None:
    baseline = read_baseline(saved(tmp_path / "b.json", ("m", "reference"), ("c", "candidate")), "eval", ("m", "c"))
    now = {"top1": 0.85, "size_bytes": 100, "size_ratio": 0.9, "latency_ms_p50": 1.5, "speedup": 7.0}
    rows = [ModelRow("m", "reference", metrics={"top1": 0.1}), ModelRow("c", "candidate", metrics=now)]
    gates = parse_gates([gate], list(now))
    baseline.require(gates)
    (found,) = baseline.apply(gates, rows)
    assert (found.model, found.value, found.passed) == ("c", pytest.approx(value), passed)


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        ("kl_nats_drop <= 1", "has no kl_nats of c. It has: latency_ms_p50, size_bytes, top1"),
        ("top5_drop <= 1", "has no top5 of c"),
        ("speedup_low >= 1", "rounds in which models take turns"),
    ],
)
def test_what_the_baseline_does_not_have_is_refused(gate: str, says: str, tmp_path: Path) -> None:
    baseline = read_baseline(saved(tmp_path / "b.json", ("m", "reference"), ("c", "candidate")), "eval", ("m", "c"))
    with pytest.raises(UsageError, match=says):
        baseline.require(parse_gates([gate], ["kl_nats", "top5", "speedup_low"]))


def test_what_changed_is_said(tmp_path: Path) -> None:
    file = saved(
        tmp_path / "b.json", ("m", "reference"), ("c", "candidate"), data_sha256="d" * 64, samples=5, threads=2
    )
    baseline = read_baseline(file, "eval", ("m", "c"))
    same = [ModelRow("m", "reference", sha256="m" * 64), ModelRow("c", "candidate", sha256="c" * 64)]
    details = {"data_sha256": "d" * 64, "samples": 5, "threads": 2}
    assert baseline.changes(Report("eval", same, details=details)) == []
    other = [ModelRow("m", "reference", sha256="e" * 64), same[1]]
    warnings = baseline.changes(Report("eval", other, details=details | {"data_sha256": "f" * 64, "threads": 4}))
    assert len(warnings) == 3
    assert warnings[0].startswith(f"m is not the model of {file}: its sha256 was mmmmmmmmmmmm... and is eeee")
    assert "Differences may come from the data alone" in warnings[1]
    assert "2 then, 4 now" in warnings[2]
    (unknown,) = baseline.changes(Report("eval", same, details={"samples": 5, "threads": 2}))
    assert "cannot be told" in unknown


def test_the_table_shows_what_changed() -> None:
    model = ModelRow("c", "reference", metrics={"top1": 0.85, "top1_se": 0.01, "size_bytes": 100, "speedup_low": 1.0})
    report = Report("eval", [model])
    assert baseline_tables(report) == []
    before = {"top1": 0.9, "size_bytes": 400, "speedup_low": 1.0}
    report.details["baseline"] = {"path": "b.json", "quantcli": "0.1.0", "models": [{"path": "c", "metrics": before}]}
    (table,) = baseline_tables(report)
    assert table.rows == [
        ("c", "Top-1", "90.00%", "85.00% +- 1.00%", "-5.00 points"), ("c", "Size, bytes", "400", "100", "-75.0%"),
    ]  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    weight, bias = weights()
    classifier(tmp_path / "m.onnx", weight, bias)
    inputs = np.random.default_rng(1).standard_normal((40, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=inputs, labels=(inputs @ weight + bias).argmax(1))
    np.savez(tmp_path / "other.npz", x=inputs[:20], labels=(inputs @ weight + bias).argmax(1)[:20])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("quantcli.benchmarking.probe.probe", lambda *_, **__: Probe(1.0, 2, 1))
    return tmp_path


def test_eval_beside_an_earlier_eval(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "m.onnx", "--data", "data.npz", "--json"]) == 0
    (place / "b.json").write_text(capsys.readouterr().out)
    common = ["eval", "m.onnx", "--baseline", "b.json", "--require", "top1_drop <= 0.01"]
    assert main([*common, "--data", "data.npz"]) == 0
    captured = capsys.readouterr()
    assert "Since the baseline" in captured.out
    assert "Warning" not in captured.err
    # The same file with another model in it, and other data.
    classifier(place / "m.onnx", *weights(seed=7))
    assert main([*common, "--data", "other.npz", "--json"]) == 1
    captured = capsys.readouterr()
    assert "m.onnx is not the model of b.json" in captured.err
    assert "The data is not that of b.json" in captured.err
    document = json.loads(captured.out)
    assert document["gates"][0]["value"] == 1.0 - document["models"][0]["metrics"]["top1"]
    assert document["baseline"]["models"][0]["metrics"]["top1"] == 1.0
    assert document["baseline"]["path"] == "b.json"
    # Said before any work is done: the data is not even looked at.
    assert main([*common[:-1], "top9_drop <= 1", "--data", "none.npz"]) != 1
    assert main(["eval", "m.onnx", "--data", "data.npz", "--baseline", "none.json"]) == 3
    assert main(["eval", "m.onnx", "--data", "data.npz", "--baseline", "m.onnx"]) == 3
    capsys.readouterr()


def test_bench_beside_an_earlier_bench(place: Path) -> None:
    report = quantcli.bench("m.onnx", data="data.npz", runs=2)
    document = report.to_dict()
    document["models"][0]["metrics"]["latency_ms_p50"] = 1e6
    (place / "b.json").write_text(json.dumps(document))
    again = quantcli.bench("m.onnx", data="data.npz", runs=2, baseline="b.json", require=["speedup >= 1000"])
    assert again.passed
    assert again.gates[0].value == pytest.approx(1e6 / (again.models[0].metrics["latency_ms_p50"] or 0))
    assert again.warnings == []
    with pytest.raises(UsageError, match=r"latencies of batch size 1, and this run of 4.* --batch-size 1"):
        quantcli.bench("m.onnx", data="data.npz", runs=2, batch_size=4, baseline="b.json")
    made_up = quantcli.bench("m.onnx", runs=2, baseline="b.json")
    assert any("The data is not that of b.json" in warning for warning in made_up.warnings)
