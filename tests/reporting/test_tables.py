"""Tables of reports: what stands in which cell, and what is left out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quantcli.reporting.headline import headline
from quantcli.reporting.metric_labels import decibel_text, metric_label, metric_text
from quantcli.reporting.report import GateRow, LayerRow, ModelRow, Report, Table
from quantcli.reporting.tables.bench import bench_tables
from quantcli.reporting.tables.calibrate import calibrate_tables
from quantcli.reporting.tables.common import collapse, error_bars, gate_table, scheme_text, short_names
from quantcli.reporting.tables.convert import convert_tables
from quantcli.reporting.tables.evaluate import eval_tables
from quantcli.reporting.tables.inspect import inspect_tables


def facts(table: Table) -> dict[str, str]:
    """A list of facts as what it says of each."""
    assert table.columns[0] == ""
    return dict(table.rows)


def test_every_row_has_a_cell_for_every_column() -> None:
    reports = [
        *inspect_tables(inspected(), layers=True),
        *calibrate_tables(calibrated(3)),
        *convert_tables(converted()),
        *eval_tables(evaluated()),
        *bench_tables(timed()),
    ]
    for table in reports:
        assert {len(row) for row in table.rows} == {len(table.columns)}, table.title
        assert all(isinstance(cell, str) for row in table.rows for cell in row)


def inspected(**more: Any) -> Report:
    details = {
        "architecture": "LlamaForCausalLM",
        "files": 1,
        "parameters": 1234567,
        "tensors": 3,
        "dtypes": {"float32": {"bytes": 4_000_000}, "bfloat16": {"bytes": 12}},
        "quantized_layers": {},
        "roles": {"linear": {"tensors": 2, "bytes": 4_000_000}},
    }
    model = ModelRow("m", "reference", "safetensors", size_bytes=4_000_012, details=details | more)
    row = LayerRow("a.weight", None, 400, 100, reason="norm", details={"shape": [10, 10], "role": "norm"})
    return Report("inspect", [model], [row])


def test_inspect_shows_a_model_and_what_schemes_would_do() -> None:
    model, roles = inspect_tables(inspected(), layers=False)
    assert facts(model) == {
        "Architecture": "LlamaForCausalLM",
        "Format": "safetensors",
        "Size": "4 MB in 1 file",
        "Parameters": "1,234,567",
        "Tensors": "3",
        "Dtypes": "float32 4 MB, bfloat16 12 B",
    }
    assert roles.rows == [("linear", "2", "4 MB")]
    scheme = {"scheme": "int4", "format": "gptq", "size_bytes": 1000, "size_ratio": 0.25, "quantized_tensors": 2}
    report = inspected()
    report.details["schemes"] = [
        scheme | {"left": {"norm": 1}, "applies": True},
        scheme | {"scheme": "nf4", "left": {}, "applies": False},
    ]
    plan = inspect_tables(report, layers=False)[-1]
    assert plan.columns[-1] == "Left"
    assert plan.rows == [("int4", "gptq", "1 kB", "0.250", "2", "1 norm")]
    report.details["schemes"] = [scheme | {"left": {}, "applies": True}]
    assert inspect_tables(report, layers=False)[-1].columns[-1] == "Tensors"
    layers = inspect_tables(report, layers=True)[-1]
    assert layers.rows == [("a.weight", "[10, 10]", "norm", "400 B", "100 B")]


def test_inspect_of_a_quantized_graph() -> None:
    more = {"parameters": None, "quantized_layers": {"int8": 1, "int4": 2}, "inputs": ["x: float32 [n, 3]"]}
    model = inspect_tables(inspected(architecture=None, operators={"Conv": 2}, **more), layers=False)[0]
    assert ("Quantized", "1 layer: int8") in model.rows
    assert ("Quantized", "2 layers: int4") in model.rows
    shown = facts(model)
    assert shown["Architecture"] == "unknown (no config.json)"
    assert (shown["Parameters"], shown["Inputs"], shown["Operators"]) == ("quantized", "x: float32 [n, 3]", "2 Conv")


def calibrated(count: int) -> Report:
    tensors = [
        {"name": f"t{i}", "elements": 1000, "min": -1.0, "max": 2.0, "low": -0.5, "high": None, "sqnr_db": float(i)}
        for i in range(count)
    ]
    tensors[0]["sqnr_db"] = None
    details = {"tensors": tensors, "samples": 8, "data": "d", "method": "mse", "output": "o"}
    return Report("calibrate", [ModelRow("m", "reference", sha256="f" * 64, size_bytes=10)], details=details)


def test_calibrate_shows_the_hardest_tensors_first_and_those_without_error_last() -> None:
    summary, worst = calibrate_tables(calibrated(3))
    assert facts(summary) | {"Model": ""} == {
        "Tensors": "3", "Values": "3,000", "Samples": "8 of d", "Method": "mse", "Model": "",
    }  # fmt: skip
    assert worst.title == "Tensors, hardest to quantize first"
    assert [row[0] for row in worst.rows] == ["t1", "t2", "t0"]
    assert worst.rows[0] == ("t1", "-1", "2", "-0.5", "-", "1.0 dB")
    assert worst.rows[-1][-1] == "-"
    report = calibrated(30)
    for index, tensor in enumerate(report.details["tensors"]):
        tensor["name"] = chr(ord("a") + index % 26) * (1 + index // 26)
    many = calibrate_tables(report)[1]
    assert (many.title, len(many.rows)) == ("Hardest to quantize", 10)


def test_calibrate_shows_alike_tensors_by_the_worst_of_them() -> None:
    worst = calibrate_tables(calibrated(30))[1]
    assert worst.rows == [("t{0-29} x 30", "-1", "2", "-0.5", "-", "1.0 dB")]
    assert "Of alike tensors the worst is shown." in (worst.note or "")


def test_eval_shows_alike_layers_in_one_row_and_which_is_worst() -> None:
    report = evaluated()
    report.layers = [
        LayerRow(f"m.layers.{i}.fc", "int4", 400, 100, db, model="out/c.onnx")
        for i, db in ((7, 2.5), (3, 10.0), (0, None))
    ]
    report.layers.append(LayerRow("head", "int8", 400, 200, 40.0, model="out/c.onnx"))
    _, table = eval_tables(report)
    assert table.columns[-2:] == ("SQNR", "Worst")
    assert table.rows == [
        ("m.layers.{0-7}.fc x 3", "int4", "1.2 kB", "300 B", "2.5 dB", "7"),
        ("head", "int8", "400 B", "200 B", "40.0 dB", ""),
    ]
    assert table.bars is not None
    assert table.bars.shares == [pytest.approx(0.95), pytest.approx(0.2)]


def test_inspect_shows_alike_tensors_in_one_row_and_each_scheme_by_itself() -> None:
    report = inspected()
    report.layers = [
        LayerRow(f"a.{i}.weight", "int4" if plan == "int4" else None, 400, 100,
                 details={"shape": [10, 10], "role": "linear", "plan": plan})
        for plan in ("int4", "fp16") for i in range(3)
    ]  # fmt: skip
    *_, first, second = inspect_tables(report, layers=True)
    assert (first.title, second.title) == ("Tensors with int4", "Tensors with fp16")
    assert first.rows == [("a.{0-2}.weight x 3", "[10, 10]", "int4", "1.2 kB", "300 B")]
    assert second.rows == [("a.{0-2}.weight x 3", "[10, 10]", "linear", "1.2 kB", "300 B")]


def test_bars_have_one_scale_for_all_tables() -> None:
    assert error_bars([-3.0, 0.0, 25.0, 80.0, None]).shares == [1.0, 1.0, 0.5, 0.0, None]


def converted(**details: Any) -> Report:
    source = ModelRow("m", "reference", "safetensors", size_bytes=4000)
    artifact = ModelRow(
        "o", "candidate", "gptq", "int4", size_bytes=1000,
        metrics={"size_ratio": 0.25}, details={"algorithm": "rtn"},
    )  # fmt: skip
    layers = [LayerRow(f"layers.{i}.fc.weight", "int4", 100, 25, db) for i, db in enumerate((30.0, None, 20.0))]
    layers += [LayerRow("head.weight", None, 60, 30, reason="output head")]
    layers += [LayerRow(f"norm{i}", None, 10, 10, reason="norm") for i in range(2)]
    return Report("convert", [source, artifact], layers, details=details)


def test_convert_shows_layers_by_their_worst_and_why_others_stay() -> None:
    layers, left, total = convert_tables(converted())
    assert layers.rows == [("layers.{0-2}.fc.weight x 3", "int4", "300 B", "75 B", "20.0 dB")]
    assert left.rows == [("output head", "1", "60 B", "30 B"), ("norm", "2", "20 B", "20 B")]
    assert total.title == "Total (dry run: nothing was written)"
    assert facts(total) == {
        "Size": "4 kB -> 1 kB", "Ratio": "0.250 (4.0x smaller)", "Format": "gptq, algorithm rtn",
    }  # fmt: skip
    estimated = convert_tables(converted(estimated=True))[-1]
    assert facts(estimated)["Size"] == "4 kB -> about 1 kB"


def test_convert_shows_what_was_verified() -> None:
    runtime = {
        "runtime": "onnxruntime 1.32", "checked": True, "conversions_left": 1,
        "integer_kernels": {"QGemm": 1}, "float_kernels": {"Softmax": 2},
    }  # fmt: skip
    done = {"seconds": 75.0, "peak_rss_bytes": 5_000_000}
    compared = {"sqnr_db": 33.3, "samples": 1}
    report = converted(**done, verified={"tensors": 3, "runtime": runtime, "compared": compared})
    report.models[1].metrics["speed"] = 2.5
    *_, kernels, total = convert_tables(report)
    assert kernels.rows == [("QGemm", "1", ""), ("Softmax", "", "2")]
    assert "1 QuantizeLinear or DequantizeLinear node remains" in (kernels.note or "")
    assert total.title == "Total"
    shown = facts(total)
    assert (shown["Time"], shown["Peak memory"]) == ("1 min 15 s", "5 MB")
    assert shown["Verified"] == "3 tensors reopened and decoded, all codes equal"
    assert shown["Runtime"] == "onnxruntime 1.32 loads it, with 1 integer kernel"
    assert shown["Outputs"] == "33.3 dB on 1 sample of the data"
    assert shown["Speed"] == "about 2.5 times the model's, on these samples"


@pytest.mark.parametrize("details", ["verified", "planned"])
def test_convert_says_in_a_sentence_what_transformers_ran(details: str) -> None:
    runtime = {"checked": False, "run": "none", "reason": "too large", "summary": "not run: too large"}
    report = converted(dry_run=True, runtime=runtime)
    if details == "verified":
        report = converted(seconds=1.0, peak_rss_bytes=1, verified={"tensors": 1, "runtime": runtime})
        assert ("Run", "not run", "too large") in headline(report)
    assert facts(convert_tables(report)[-1])["Runtime"] == "not run: too large"


def evaluated() -> Report:
    reference = {"size_ratio": 1.0, "top1": 0.98, "top1_se": 0.01, "mine": 3.14159265}
    models = [ModelRow("out/m.onnx", "reference", "onnx", None, size_bytes=4000, metrics=dict(reference))]
    candidate = {"size_ratio": 0.25, "top1": 0.97, "sqnr_db": 31.26}
    models += [ModelRow("out/c.onnx", "candidate", "onnx", "int8", metrics=dict(candidate))]
    return Report("eval", models, details={"samples": 5, "data": "d", "task": "classification"})


def test_eval_shows_models_side_by_side() -> None:
    report = evaluated()
    (table,) = eval_tables(report)
    assert table.title == "Classification, models in out"
    assert table.columns == ("Model", "Scheme", "Size", "Ratio", "Top-1", "SQNR", "mine")
    assert table.rows == [
        ("m.onnx", "onnx", "4 kB", "1.000", "98.00% +- 1.00%", "-", "3.1416"),
        ("c.onnx", "int8", "-", "0.250", "97.00%", "31.3 dB", "-"),
    ]
    assert table.note == "5 samples of d; +- is one standard error"
    report.details["task"] = "package.module:function"
    assert eval_tables(report)[0].title == "package.module:function, models in out"


def test_eval_shows_verdicts_layers_and_gates() -> None:
    report = evaluated()
    report.models[1].details["verdict"] = "as good as Q8_0"
    report.layers = [
        LayerRow("fc", "int8", 400, 100, 12.34, model="out/c.onnx"),
        LayerRow("relu", None, 0, 0, None, model="out/c.onnx"),
    ]
    report.gates = [
        GateRow("top1 >= 1", "out/c.onnx", 0.97, passed=False),
        GateRow("kl_nats < 1", "elsewhere", None, passed=False),
        GateRow("top1 >= 0", "out/c.onnx", 0.123456789, passed=True),
    ]
    _, verdict, layers, gates = eval_tables(report)
    assert verdict.rows == [("c.onnx", "as good as Q8_0")]
    assert layers.title == "Layers of out/c.onnx, worst first"
    assert layers.rows == [("fc", "int8", "400 B", "100 B", "12.3 dB"), ("relu", "", "-", "-", "-")]
    assert gates.rows == gate_table(report).rows
    assert gates.rows == [
        ("top1 >= 1", "c.onnx", "0.97", "FAILED"),
        ("kl_nats < 1", "elsewhere", "none", "FAILED"),
        ("top1 >= 0", "c.onnx", "0.123457", "passed"),
    ]


def timed() -> Report:
    def model(path: str, role: str, **batch: Any) -> ModelRow:
        times = {"batch_size": 8, "latency_ms_p50": 1.0, "latency_ms_p90": 12.345, "latency_ms_p99": 1234.5}
        kernels = {"integer_kernels": {"QGemm": 2}, "float_kernels": {"Conv": 1}}
        details = {
            "batches": [times | {"throughput_per_s": 99.99, "rounds": 20} | batch],
            "kernels": kernels if role == "candidate" else {"dtypes": ["float32"]},
            "baseline_rss_bytes": 3_000_000,
        }
        metrics: dict[str, float | None] = {"size_ratio": None, "load_ms": 5.0, "peak_rss_bytes": 7e6}
        return ModelRow(path, role, "onnx", size_bytes=None, metrics=metrics, details=details)

    speedup = {"speedup": 2.0, "speedup_low": 1.5, "speedup_high": 2.5, "verdict": "faster"}
    models = [model("m", "reference"), model("c", "candidate", throughput_per_s=1234.5, **speedup)]
    details = {"threads": 1, "inputs": {"x": [8, 3]}, "cpu": "A CPU", "runtimes": ["onnxruntime 1"], "data": "made up"}
    return Report("bench", models, details=details)


def test_bench_shows_latency_and_what_models_take() -> None:
    latency, resources = bench_tables(timed())
    assert latency.rows == [
        ("m", "onnx", "8", "1.00", "12.3", "1,234", "100", "-"),
        ("c", "onnx", "8", "1.00", "12.3", "1,234", "1,234", "2.00x [1.50, 2.50] faster"),
    ]
    assert latency.note == (
        "A CPU, 1 thread; onnxruntime 1; 20 interleaved rounds on made-up inputs (x 8 x 3); "
        "speed-up with its interval of 95%"
    )
    assert resources.rows == [
        ("m", "-", "-", "5.00 ms", "7 MB", "float32"),
        ("c", "-", "-", "5.00 ms", "7 MB", "integer: 2 QGemm; float: 1 Conv"),
    ]
    assert "3 MB" in (resources.note or "")


def test_formats_are_named_where_they_differ() -> None:
    one, other = ModelRow("a", "reference", "gptq", "int4"), ModelRow("b", "candidate", "awq", "int4")
    assert scheme_text(one, Report("eval", [one, one])) == "int4"
    assert scheme_text(one, Report("eval", [one, other])) == "gptq int4"


def test_metrics_are_written_as_people_read_them() -> None:
    assert metric_text({"kl_nats": 0.000123456}, "kl_nats") == "0.000123"
    assert metric_text({"x": 1.0, "x_se": 0.5}, "x") == "1 +- 0.5"
    assert metric_text({"x": None}, "x") == metric_text({}, "x") == decibel_text(None) == "-"
    assert (metric_label("kl_nats"), metric_label("mine")) == ("KL (nats)", "mine")


def test_report_json_has_no_infinities() -> None:
    report = Report("eval", [ModelRow("a", "reference", metrics={"x": float("nan"), "y": float("inf"), "z": 1.5})])
    report.layers = [LayerRow("l", None, 1, 1, float("-inf"))]
    report.gates = [GateRow("x < 1", "a", None, passed=False)]
    document = json.loads(report.to_json())
    assert document["models"][0]["metrics"] == {"x": None, "y": None, "z": 1.5}
    assert document["layers"][0]["sqnr_db"] is None
    assert not report.passed


def test_markdown_tables_escape_pipes() -> None:
    table = Table("T", ("A", "Size"), [("x|y", "1")], frozenset({"Size"}), "note")
    assert table.to_markdown() == "### T\n\n| A | Size |\n| --- | ---: |\n| x\\|y | 1 |\n\nnote\n"


def test_alike_layers_share_a_row() -> None:
    rows = [LayerRow(f"m.layers.{i}.fc.weight", "int4", 1, 1) for i in (0, 1, 2)] + [
        LayerRow("head.weight", "int4", 1, 1)
    ]
    names = [(group.name, len(group.rows)) for group in collapse(rows, key=lambda row: row.scheme or "")]
    assert names == [("m.layers.{0-2}.fc.weight x 3", 3), ("head.weight", 1)]


def test_many_rows_that_differ_in_any_number_share_one() -> None:
    def names(count: int) -> list[str]:
        rows = [LayerRow(f"conv2d_{i}.w_0", "int8", 1, 1) for i in range(10, 10 + count)]
        groups = collapse([*rows, LayerRow("fc1.w", None, 1, 1)], key=lambda row: row.scheme or "")
        return [group.name for group in groups]

    assert names(30) == ["conv2d_{10-39}.w_0 x 30", "fc1.w"]
    assert len(names(8)) == 9


@pytest.mark.parametrize(
    ("paths", "names", "folder"),
    [
        (["out/a.onnx", "out/b/c.onnx"], ["a.onnx", "b/c.onnx"], ", models in out"),
        (["/t/m", "/t/int8"], ["m", "int8"], ", models in /t"),
        (["out/a.onnx"], ["out/a.onnx"], ""),
        (["/a/m", "/b/m"], ["/a/m", "/b/m"], ""),
        (["/a/m", "a/n"], ["/a/m", "a/n"], ""),
        (["package.module:function", "out/a.onnx"], ["package.module:function", "out/a.onnx"], ""),
    ],
)
def test_the_folder_that_models_share_is_named_once(paths: list[str], names: list[str], folder: str) -> None:
    found, shared = short_names([ModelRow(path, "reference") for path in paths])
    assert ([found[path] for path in paths], shared) == (names, folder)
