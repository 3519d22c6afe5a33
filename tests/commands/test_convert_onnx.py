"""Conversion of ONNX models end to end, through the library and the command line, with good input and bad."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.graphs import model, node, normal
from support.onnx_models import cnn, encoder, feeds, halved

from quantcli.cli.app import main
from quantcli.commands.calibrate import calibrate
from quantcli.commands.convert import convert, implied_format
from quantcli.conversion.onnx.comparison import OutputComparison
from quantcli.data.sources.base import Sample
from quantcli.errors import InputError
from quantcli.models.session import Session
from quantcli.onnx.graph.model import open_onnx

SCHEMES = ["fp16", "bf16", "int8", "int4", "nf4", "int8-dynamic", "int8-static"]
SNR = {"fp16": 60, "bf16": 40, "int8": 35, "int4": 12, "nf4": 12, "int8-dynamic": 30, "int8-static": 25}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cnn.onnx and encoder.onnx, each with its data. To be left as they are."""
    folder = tmp_path_factory.mktemp("onnx")
    for name, build in (("cnn", cnn), ("encoder", encoder)):
        onnx.save(build(), folder / f"{name}.onnx")
        np.savez(folder / f"{name}.npz", **feeds(name))
    return folder


def sqnr_db(reference: Path, candidate: Path, name: str) -> float:
    fed = feeds(name, 5)
    expected, got = (Session(path).run(fed)["y"].astype(np.float64) for path in (reference, candidate))
    return float(10 * np.log10(np.square(expected).sum() / max(np.square(expected - got).sum(), 1e-300)))


def untouched(folder: Path, *expected: str) -> None:
    """Nothing beside the expected files: no output, no half of one."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)


def refused(capsys: pytest.CaptureFixture[str], status: int, *arguments: object, says: str) -> None:
    """Run the command line; it fails with one clear paragraph."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == status
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("Error: ") and "Traceback" not in shown.err
    assert "\n\n" not in shown.err.strip()
    flat = " ".join(shown.err.split())
    assert says in flat, flat


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["cnn", "encoder"])
def test_every_scheme(home: Path, tmp_path: Path, name: str, scheme: str) -> None:
    out, again = tmp_path / "out.onnx", tmp_path / "again.onnx"
    data = home / f"{name}.npz"
    report = convert(home / f"{name}.onnx", out, scheme=scheme, data=data)
    convert(home / f"{name}.onnx", again, scheme=scheme, data=data)
    assert out.read_bytes() == again.read_bytes()
    untouched(tmp_path, "out.onnx", "again.onnx")
    onnx.checker.check_model(out)
    assert sqnr_db(home / f"{name}.onnx", out, name) > SNR[scheme]
    source, artifact = report.models
    assert artifact.size_bytes == out.stat().st_size < source.size_bytes == (home / f"{name}.onnx").stat().st_size
    compared = report.details["verified"]["compared"]
    assert compared["samples"] == 8 and compared["sqnr_db"] > SNR[scheme] - 2
    quantized = {row.name: row.scheme for row in report.layers if row.scheme}
    assert len(quantized) >= 2
    if scheme == "int8-static" and name == "cnn":
        kernels = report.details["verified"]["runtime"]["integer_kernels"]
        assert kernels["QLinearConv"] == 2 and kernels["QGemm"] == 1 and kernels["QLinearAdd"] == 1
        assert report.details["verified"]["runtime"]["float_kernels"] == {}
    if scheme == "int8-dynamic" and name == "encoder":
        assert report.details["verified"]["runtime"]["integer_kernels"] == {
            "DynamicQuantizeMatMul": 2, "GatherBlockQuantized": 1,
        }  # fmt: skip


def test_the_manifest_holds_what_was_done_and_neither_time_nor_path(home: Path, tmp_path: Path) -> None:
    wishes: dict[str, Any] = {"scheme": "int8-static", "skip": ["stem.*"]}
    report = convert(home / "cnn.onnx", tmp_path / "out.onnx", data=home / "cnn.npz", **wishes)
    manifest = open_onnx(tmp_path / "out.onnx").manifest.to_json()
    assert manifest is not None
    assert manifest["scheme"] == "int8-static" and manifest["format"] == "onnx"
    assert manifest["input_sha256"] == report.models[0].sha256
    assert manifest["recipe"]["skip"] == ["stem.*"]
    assert manifest["layers"]["stem.weight"] == {"node": "stem", "mode": "float", "reason": "skipped as asked"}
    assert manifest["layers"]["body.weight"]["mode"] == "static" and manifest["layers"]["body.weight"]["sqnr_db"] > 30
    assert manifest["verified"]["codes"] == "equal" and "compared" in manifest["verified"]
    assert str(home) not in json.dumps(manifest) and str(tmp_path) not in json.dumps(manifest)
    # Where the same lies under another name, the same bytes come out.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file, other in (("cnn.onnx", "net.onnx"), ("cnn.npz", "set.npz")):
        (elsewhere / other).write_bytes((home / file).read_bytes())
    convert(elsewhere / "net.onnx", elsewhere / "o.onnx", data=elsewhere / "set.npz", **wishes)
    assert (elsewhere / "o.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


def test_a_folder_as_output_and_a_folder_as_input(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "model.onnx").write_bytes((home / "encoder.onnx").read_bytes())
    (source / "tokenizer.json").write_text("{}")
    convert(source, tmp_path / "out", scheme="int8")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "tokenizer.json"]
    assert sqnr_db(home / "encoder.onnx", tmp_path / "out" / "model.onnx", "encoder") > 30
    untouched(tmp_path, "model", "out")


@pytest.mark.parametrize("out", ["out.onnx", "out"])
@pytest.mark.parametrize("scheme", ["int8-static", "int8", "fp16"])
def test_external_data_in_and_out(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, out: str
) -> None:
    monkeypatch.setattr("quantcli.onnx.graph.save.SINGLE_FILE_LIMIT_BYTES", 1000)
    source = tmp_path / "source"
    source.mkdir()
    onnx.save(cnn(), source / "cnn.onnx", save_as_external_data=True, location="cnn.bin", size_threshold=0)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    place = tmp_path / "place"
    place.mkdir()
    report = convert(source / "cnn.onnx", place / out, scheme=scheme, data=home / "cnn.npz")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    file = place / out if out.endswith(".onnx") else place / out / "model.onnx"
    opened = open_onnx(file)
    assert len(opened.files) == 2 and all(path.parent == file.parent for path in opened.files)
    assert report.models[1].size_bytes == opened.size_bytes < report.models[0].size_bytes
    assert sqnr_db(home / "cnn.onnx", file, "cnn") > SNR[scheme]
    expected = ["out.onnx", "out.onnx.data"] if out.endswith(".onnx") else ["out"]
    untouched(place, *expected)
    again = tmp_path / "again"
    again.mkdir()
    convert(source / "cnn.onnx", again / out, scheme=scheme, data=home / "cnn.npz")
    for one, two in zip(opened.files, open_onnx(again / file.relative_to(place)).files, strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_weights_beside_an_output_are_not_overwritten_unasked(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("quantcli.onnx.graph.save.SINGLE_FILE_LIMIT_BYTES", 1000)
    (tmp_path / "out.onnx.data").write_text("precious")
    command = ["convert", home / "cnn.onnx", "-o", tmp_path / "out.onnx", "--scheme", "int8"]
    refused(capsys, 2, *command, says="out.onnx.data exists")
    assert (tmp_path / "out.onnx.data").read_text() == "precious"
    untouched(tmp_path, "out.onnx.data")
    assert main([*map(str, command), "--force"]) == 0
    assert sqnr_db(home / "cnn.onnx", tmp_path / "out.onnx", "cnn") > 30


def test_a_dry_run_writes_nothing_and_estimates_the_size(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, scheme in (("cnn", "int8-static"), ("encoder", "int8-dynamic"), ("encoder", "int4"), ("cnn", "fp16")):
        command = ["convert", str(home / f"{name}.onnx"), "-o", str(tmp_path / "out.onnx"), "--scheme", scheme]
        command += ["--data", str(home / f"{name}.npz"), "--json"]
        capsys.readouterr()
        assert main([*command, "--dry-run"]) == 0
        estimate = json.loads(capsys.readouterr().out)["models"][1]["size_bytes"]
        untouched(tmp_path)
        assert main([*command]) == 0
        real = json.loads(capsys.readouterr().out)["models"][1]["size_bytes"]
        # Scales, the manifest and our nodes are most of the difference in so small a model.
        assert estimate < real < estimate * 1.35 + 8000
        (tmp_path / "out.onnx").unlink()


def test_a_shared_weight_is_counted_once(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Tanh", ["h"], ["t"]), node("MatMul", ["t", "w"], ["y"])]
    proto = model(nodes, {"x": ["n", 128]}, {"y": None}, {"w": normal(128, 128, scale=0.1)})
    onnx.save(proto, tmp_path / "m.onnx")
    for scheme in ("int8-dynamic", "int8", "int4", "fp16"):
        dry = convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme=scheme, dry_run=True)
        real = convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme=scheme, force=True)
        assert dry.models[1].size_bytes is not None and dry.models[1].size_bytes > 5000
        for report in (dry, real):
            assert sum(row.bytes_before for row in report.layers) == 128 * 128 * 4
            assert sum(row.bytes_after for row in report.layers) < 128 * 128 * 2.1
        assert open_onnx(tmp_path / "o.onnx").size_bytes < 128 * 128 * 2.1 + 6000


def test_existing_output_and_force(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.onnx"
    out.write_text("precious")
    command = ["convert", home / "cnn.onnx", "-o", out, "--scheme", "int8"]
    refused(capsys, 2, *command, says="exists")
    assert out.read_text() == "precious"
    assert main([*map(str, command), "--force"]) == 0
    assert open_onnx(out).manifest is not None
    untouched(tmp_path, "out.onnx")


def test_the_input_is_never_the_output(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "m.onnx"
    source.write_bytes((home / "cnn.onnx").read_bytes())
    refused(capsys, 2, "convert", source, "-o", source, "--scheme", "int8", "--force", says="overlap")
    assert source.read_bytes() == (home / "cnn.onnx").read_bytes()


def test_recipes_with_rules(home: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "scheme: int8-static\nskip: [stem]\nrules:\n- match: ['head*']\n  scheme: int4\n  group_size: 32\n"
    )
    report = convert(home / "cnn.onnx", tmp_path / "out.onnx", recipe=recipe, data=home / "cnn.npz")
    rows = {row.name: row for row in report.layers}
    assert rows["stem.weight"].scheme is None and rows["stem.weight"].reason == "skipped as asked"
    assert rows["body.weight"].scheme == "int8-static"
    assert rows["head.weight"].scheme == "int4 group 32"
    runtime = report.details["verified"]["runtime"]
    assert runtime["integer_kernels"]["QLinearConv"] == 1 and runtime["integer_kernels"]["MatMulNBits"] == 1
    assert sum(runtime["float_kernels"].values()) == 1


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("scheme: int8\nskip: [nothing-like-this]\n", "matches no layer"),
        ("scheme: int8\nrules: [{match: 'stem*', scheme: int9}]\n", "int9"),
        ("shceme: int8\n", "shceme"),
        ("skip: [stem]\n", "No scheme is given"),
        ("scheme: int8-dynamic\ngroup_size: 32\n", "--group-size does not apply"),
        ("scheme: int8\nalgorithm: nothing\n", "nothing"),
    ],
)
def test_recipes_that_cannot_be_meant(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, says: str
) -> None:
    (tmp_path / "r.yaml").write_text(recipe)
    command = ["convert", home / "cnn.onnx", "-o", tmp_path / "o.onnx", "--recipe", tmp_path / "r.yaml"]
    refused(capsys, 2, *command, says=says)
    untouched(tmp_path, "r.yaml")


def test_calibration_by_file_equals_calibration_by_data_and_fits_one_model_only(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = tmp_path / "stats.safetensors"
    calibrate(str(home / "cnn.onnx"), data=str(home / "cnn.npz"), output=stats)
    convert(home / "cnn.onnx", tmp_path / "a.onnx", scheme="int8-static", calibration=stats)
    convert(home / "cnn.onnx", tmp_path / "b.onnx", scheme="int8-static", data=home / "cnn.npz")
    one, two = (open_onnx(tmp_path / name).ir.graph.initializers for name in ("a.onnx", "b.onnx"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.const_value.tobytes() == two[name].const_value.tobytes(), name
    other = cnn()
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(normal(64, 3, 3, 3, seed=77), "stem.weight"))
    onnx.save(other, tmp_path / "other.onnx")
    for source in (tmp_path / "other.onnx", home / "encoder.onnx"):
        refused(
            capsys, 3, "convert", source, "-o", tmp_path / "o.onnx", "--scheme", "int8-static", "--calibration", stats,
            says="belong to another model",
        )  # fmt: skip
    untouched(tmp_path, "stats.safetensors", "a.onnx", "b.onnx", "other.onnx")


def test_an_older_operator_set_is_calibrated_and_upgraded(home: Path, tmp_path: Path) -> None:
    proto = cnn()
    proto.opset_import[0].version, proto.ir_version = 11, 6
    onnx.save(proto, tmp_path / "old.onnx")
    stats = tmp_path / "stats.safetensors"
    calibrate(str(tmp_path / "old.onnx"), data=str(home / "cnn.npz"), output=stats)
    convert(tmp_path / "old.onnx", tmp_path / "out.onnx", scheme="int8-static", calibration=stats)
    assert open_onnx(tmp_path / "out.onnx").opset == 13
    assert sqnr_db(tmp_path / "old.onnx", tmp_path / "out.onnx", "cnn") > 25


def test_static_without_data_is_a_usage_error(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", home / "cnn.onnx", "-o", tmp_path / "out.onnx", "--scheme", "int8-static"]
    refused(capsys, 2, *command, says="needs the ranges of activations")
    untouched(tmp_path)
    refused(capsys, 2, *command[:-2], says="No scheme is given")
    untouched(tmp_path)


def test_data_that_does_not_fit_is_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", home / "cnn.onnx", "-o", tmp_path / "out.onnx", "--scheme", "int8-static", "--data"]
    refused(capsys, 3, *command, home / "encoder.npz", says="x")
    refused(capsys, 3, *command, home / "missing.npz", says="missing.npz")
    np.savez(tmp_path / "bad.npz", x=normal(4, 5, 12, 12))
    refused(capsys, 3, *command, tmp_path / "bad.npz", says="3")
    untouched(tmp_path, "bad.npz")


def test_values_that_are_no_numbers_are_told_of(home: Path, tmp_path: Path) -> None:
    x = feeds("cnn")["x"]
    x[3, 1] = np.nan
    np.savez(tmp_path / "nan.npz", x=x)
    report = convert(home / "cnn.onnx", tmp_path / "out.onnx", scheme="int8-static", data=tmp_path / "nan.npz")
    assert any(warning.startswith("x is not a number (NaN) in 144 of its") for warning in report.warnings)
    assert sqnr_db(home / "cnn.onnx", tmp_path / "out.onnx", "cnn") > 25


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic", "int8", "int4"])
@pytest.mark.parametrize("name", ["cnn", "encoder"])
def test_what_is_quantized_already_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, scheme: str
) -> None:
    out = tmp_path / "out.onnx"
    convert(home / f"{name}.onnx", out, scheme=scheme, data=home / f"{name}.npz")
    refused(capsys, 3, "convert", out, "-o", tmp_path / "o.onnx", "--scheme", "int8", says="already quantized")
    untouched(tmp_path, "out.onnx")


def saved(tmp_path: Path, nodes: list[onnx.NodeProto], shape: list[Any], **constants: np.ndarray) -> Path:
    onnx.save(model(nodes, {"x": shape}, {"y": None}, constants), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_models_with_nothing_to_quantize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, [node("Relu", ["x"], ["y"])], ["n", 3])
    for scheme in ("int8", "int8-dynamic", "fp16", "int4"):
        refused(capsys, 3, "convert", path, "-o", tmp_path / "o.onnx", "--scheme", scheme, says="applies to nothing")
    untouched(tmp_path, "m.onnx")


def test_an_artifact_larger_than_the_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, [node("MatMul", ["x", "w"], ["y"])], ["n", 16], w=normal(16, 16))
    refused(capsys, 3, "convert", path, "-o", tmp_path / "o.onnx", "--scheme", "int8-dynamic", says="too small a model")
    untouched(tmp_path, "m.onnx")


def truncated(home: Path, path: Path) -> None:
    path.write_bytes((home / "cnn.onnx").read_bytes()[:90_000])


def garbage(home: Path, path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def external(path: Path, **changes: str) -> None:
    proto = cnn()
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = changes.get(entry.key, entry.value)
    path.write_bytes(proto.SerializeToString())


def missing_data(home: Path, path: Path) -> None:
    external(path)
    (path.parent / "weights.bin").unlink()


def short_data(home: Path, path: Path) -> None:
    external(path)
    data = path.parent / "weights.bin"
    data.write_bytes(data.read_bytes()[:5000])


def climbing_data(home: Path, path: Path) -> None:
    (path.parent.parent / "secret.bin").write_bytes(bytes(10**6))
    external(path, location="../secret.bin")


def absolute_data(home: Path, path: Path) -> None:
    external(path, location="/dev/zero")


def linked_data(home: Path, path: Path) -> None:
    external(path)
    (path.parent / "weights.bin").rename(path.parent.parent / "moved.bin")
    (path.parent / "weights.bin").symlink_to(path.parent.parent / "moved.bin")


def old_opset(home: Path, path: Path) -> None:
    proto = cnn()
    proto.opset_import[0].version = 6
    onnx.save(proto, path)


def cyclic(home: Path, path: Path) -> None:
    nodes = [node("Add", ["x", "b"], ["a"]), node("Add", ["a", "x"], ["b"]), node("MatMul", ["b", "w"], ["y"])]
    path.write_bytes(model(nodes, {"x": ["n", 64]}, {"y": None}, {"w": normal(64, 64)}).SerializeToString())


def dangling(home: Path, path: Path) -> None:
    nodes = [node("Add", ["x", "nowhere"], ["a"]), node("MatMul", ["a", "w"], ["y"])]
    path.write_bytes(model(nodes, {"x": ["n", 64]}, {"y": None}, {"w": normal(64, 64)}).SerializeToString())


def wrong_shape(home: Path, path: Path) -> None:
    proto = cnn()
    proto.graph.initializer[3].dims[0] = 65
    path.write_bytes(proto.SerializeToString())


def unknown_operator(home: Path, path: Path) -> None:
    nodes = [node("Wobble", ["x"], ["a"]), node("MatMul", ["a", "w"], ["y"])]
    path.write_bytes(model(nodes, {"x": ["n", 64]}, {"y": None}, {"w": normal(64, 64)}).SerializeToString())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncated, "is not a readable ONNX model"), (garbage, "is not"), (lambda h, p: p.write_bytes(b""), "no graph"),
        (lambda h, p: p.mkdir(), "bad.onnx"), (missing_data, "which is missing"), (short_data, "truncated"),
        (climbing_data, "outside its own folder"), (absolute_data, "outside its own folder"),
        (linked_data, "outside its own folder"), (old_opset, "operator set 6"), (cyclic, "bad.onnx"),
        (dangling, "bad.onnx"), (wrong_shape, "'body.weight' has 147456 bytes in place of 149760"),
        (unknown_operator, "cannot be loaded"),
        (lambda h, p: None, "does not exist"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_damaged_models(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str,
    damage: Callable[[Path, Path], object], says: str,
) -> None:  # fmt: skip
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    out = tmp_path / "out"
    out.mkdir()
    damage(home, folder / "bad.onnx")
    refused(capsys, 3, "convert", folder / "bad.onnx", "-o", out / "o.onnx", "--scheme", scheme, says=says)
    refused(capsys, 3, "convert", folder / "bad.onnx", "-o", out / "o", "--scheme", scheme, says=says)
    untouched(out)


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--scheme", "int8", "--skip", "table", "--target", "onnxruntime==1.20"], 3, "up.weight as int8 is run by"),
        (
            ["--scheme", "int8-dynamic", "--target", "onnxruntime==1.22"],
            3,
            "table as int8-dynamic is run by onnxruntime 1.23",
        ),
        (["--scheme", "int4", "--target", "onnxruntime==1.10"], 3, "older than any that was tried"),
        (["--scheme", "int8", "--target", "vllm"], 2, "vllm does not load ONNX"),
        (["--scheme", "int8", "--target", "transformers"], 2, "transformers does not load ONNX"),
        (["--scheme", "int8", "--target", "onnxruntime==x"], 2, "is not RUNTIME==VERSION"),
        (["--scheme", "int8", "--format", "compressed-tensors"], 2, "cannot be written as compressed-tensors"),
        (["--scheme", "int9"], 2, "int9"),
        (["--scheme", "int8", "--skip", "wobble*"], 2, "matches no layer"),
        (["--scheme", "int8-dynamic", "--group-size", "32"], 2, "--group-size"),
        (["--scheme", "int4", "--group-size", "7"], 3, "applies to nothing"),
    ],
)
def test_wishes_that_cannot_be_met(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, says: str
) -> None:
    refused(capsys, status, "convert", home / "encoder.onnx", "-o", tmp_path / "o.onnx", *arguments, says=says)
    untouched(tmp_path)


def test_a_target_that_fits_is_accepted(home: Path, tmp_path: Path) -> None:
    report = convert(home / "encoder.onnx", tmp_path / "o.onnx", scheme="int8-dynamic", target="onnxruntime==1.24")
    assert report.models[1].scheme == "int8-dynamic"


def test_outliers_make_a_product_dynamic(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w1"], ["h"]), node("Tanh", ["h"], ["t"]), node("MatMul", ["t", "w2"], ["y"])]
    path = saved(tmp_path, nodes, ["n", 64, 64], w1=normal(64, 96, scale=0.1), w2=normal(96, 64, seed=1))
    x = normal(32, 64, 64)
    x[0, 0, 0] = 800
    np.savez(tmp_path / "d.npz", x=x)
    report = convert(path, tmp_path / "o.onnx", scheme="int8-static", data=tmp_path / "d.npz")
    rows = {row.name: row for row in report.layers}
    assert rows["w1"].scheme == "int8-dynamic" and "outliers" in rows["w1"].details["note"]
    assert rows["w2"].scheme == "int8-static" and "outliers" not in rows["w2"].details.get("note", "")
    manifest = open_onnx(tmp_path / "o.onnx").manifest.to_json()
    assert manifest is not None and manifest["layers"]["w1"]["mode"] == "dynamic"
    assert report.details["verified"]["runtime"]["integer_kernels"] == {
        "DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1,
    }  # fmt: skip


@pytest.mark.parametrize("place", ["input", "output"])
def test_outliers_leave_a_convolution_float(tmp_path: Path, place: str) -> None:
    """In what it reads, or only in what it writes: one patch of the input is just what one channel looks for."""
    nodes = [
        node("Conv", ["x", "w1"], ["a"]), node("Tanh", ["a"], ["t"]), node("Conv", ["t", "w2"], ["y"]),
    ]  # fmt: skip
    weight = normal(64, 8, 3, 3, scale=0.1)
    x = normal(32, 8, 30, 30)
    if place == "input":
        x[0, 0, 0, 0] = 800
    else:
        pattern = np.sign(weight[0])
        x[0, :, 4:7, 4:7], weight[0] = 5 * pattern, 0.6 * pattern
    path = saved(tmp_path, nodes, ["n", 8, 30, 30], w1=weight, w2=normal(64, 64, 3, 3, seed=1, scale=0.1))
    np.savez(tmp_path / "d.npz", x=x)
    report = convert(path, tmp_path / "o.onnx", scheme="int8-static", data=tmp_path / "d.npz")
    rows = {row.name: row for row in report.layers}
    said = f"outliers: fixed ranges would leave its {place}"
    assert rows["w1"].scheme is None and said in f"{rows['w1'].reason}"
    assert rows["w2"].scheme == "int8-static"
    runtime = report.details["verified"]["runtime"]
    assert runtime["integer_kernels"] == {"QLinearConv": 1} and sum(runtime["float_kernels"].values()) == 1


def test_a_channel_that_owns_the_range_leaves_a_product_float(tmp_path: Path) -> None:
    """Its signal hides in the tensor's ratio that the others have no levels left, and dynamic ranges have them too."""
    nodes = [node("MatMul", ["x", "w1"], ["h"]), node("Tanh", ["h"], ["t"]), node("MatMul", ["t", "w2"], ["y"])]
    weight, x = normal(64, 96, scale=0.1), normal(32, 64, 64)
    weight[0] /= 1000
    x[..., 0] *= 1000
    path = saved(tmp_path, nodes, ["n", 64, 64], w1=weight, w2=normal(96, 64, seed=1))
    np.savez(tmp_path / "d.npz", x=x)
    report = convert(path, tmp_path / "o.onnx", scheme="int8-static", data=tmp_path / "d.npz")
    rows = {row.name: row for row in report.layers}
    assert rows["w1"].scheme is None and "a few channels leave the others" in str(rows["w1"].reason)
    assert rows["w2"].scheme == "int8-static"
    assert report.models[1].metrics["output_sqnr_db"] > 25


def test_the_better_scheme_is_recommended(tmp_path: Path) -> None:
    """Ranges that differ by sample: fixed ones fit the widest, found ones each."""
    nodes = [node("MatMul", ["x", "w1"], ["h"]), node("Tanh", ["h"], ["t"]), node("MatMul", ["t", "w2"], ["y"])]
    path = saved(tmp_path, nodes, ["n", 64, 64], w1=normal(64, 96, scale=0.1), w2=normal(96, 64, seed=1))
    x = normal(32, 64, 64)
    x[8:] *= 60
    np.savez(tmp_path / "d.npz", x=x)
    report = convert(path, tmp_path / "o.onnx", scheme="int8-static", data=tmp_path / "d.npz")
    assert report.details["recommended"] == "int8-dynamic"
    assert any("int8-dynamic" in warning and "recommended" in warning for warning in report.warnings)
    np.savez(tmp_path / "even.npz", x=normal(32, 64, 64))
    even = convert(path, tmp_path / "e.onnx", scheme="int8-static", data=tmp_path / "even.npz")
    said = [warning for warning in even.warnings if "times as fast" not in warning]  # what a busy machine gives rise to
    assert even.details["recommended"] == "int8-static" and not said


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "int8-dynamic", "int8-static"])
def test_data_serves_any_mixture_of_layers(tmp_path: Path, scheme: str) -> None:
    """Means are asked for the layers whose biases are corrected, and for no other: others were not observed."""
    table, filters = normal(64, 32), normal(8, 3, 3, 3, scale=0.2)
    nodes = [
        node("Conv", ["x", "f"], ["a"], pads=[1, 1, 1, 1]), node("ConvTranspose", ["a", "u"], ["c"]),
        node("GlobalAveragePool", ["c"], ["p"]), node("Flatten", ["p"], ["q"]), node("MatMul", ["q", "w"], ["h"]),
        node("ArgMax", ["h"], ["i"], axis=1, keepdims=0), node("Gather", ["t", "i"], ["e"]),
        node("Transpose", ["t"], ["tt"], perm=[1, 0]), node("MatMul", ["e", "tt"], ["y"]),
    ]  # fmt: skip
    path = saved(
        tmp_path, nodes, ["n", 3, 8, 8], f=filters, u=normal(8, 32, 2, 2, scale=0.2), w=normal(32, 64), t=table
    )
    np.savez(tmp_path / "d.npz", x=normal(16, 3, 8, 8) + 1)
    report = convert(path, tmp_path / "o.onnx", scheme=scheme, data=tmp_path / "d.npz")
    assert {row.name for row in report.layers if row.scheme} >= {"u", "w", "t"}


def test_the_rest_is_cast_where_the_user_says_so(home: Path, tmp_path: Path) -> None:
    plain = convert(home / "cnn.onnx", tmp_path / "a.onnx", scheme="int8", skip=["body.weight"])
    cast = convert(home / "cnn.onnx", tmp_path / "b.onnx", scheme="int8", skip=["body.weight"], rest="fp16")
    rows = [{row.name: row for row in report.layers}["body.weight"] for report in (plain, cast)]
    assert rows[0].scheme is None and rows[0].bytes_after == rows[0].bytes_before
    assert rows[1].scheme == "fp16" and rows[1].bytes_after * 2 == rows[1].bytes_before
    assert sqnr_db(tmp_path / "a.onnx", tmp_path / "b.onnx", "cnn") > 50


def test_flags_that_do_not_apply_are_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", home / "cnn.onnx", "-o", tmp_path / "o.onnx", "--scheme", "int8", "--max-memory", "100MB"]
    refused(capsys, 2, *command, says="--max-memory 100 MB is too little: onnxruntime needs 461 MB in all")


def test_one_thread_gives_the_same_bytes(home: Path, tmp_path: Path) -> None:
    for name, threads in (("a.onnx", 1), ("b.onnx", None)):
        convert(home / "cnn.onnx", tmp_path / name, scheme="int4", threads=threads)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_outliers_everywhere_leave_nothing_and_the_message_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = normal(32, 8, 30, 30)
    x[0, 0, 0, 0] = 800
    np.savez(tmp_path / "d.npz", x=x)
    path = saved(tmp_path, [node("Conv", ["x", "w"], ["y"])], ["n", 8, 30, 30], w=normal(64, 8, 3, 3))
    command = ["convert", path, "-o", tmp_path / "o.onnx", "--scheme", "int8-static", "--data", tmp_path / "d.npz"]
    refused(capsys, 3, *command, says="outliers: fixed ranges would leave its input")
    untouched(tmp_path, "d.npz", "m.onnx")


def test_the_json_document(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.onnx"
    command = ["convert", home / "cnn.onnx", "-o", out, "--scheme", "int8-static", "--data", home / "cnn.npz", "--json"]
    assert main([str(each) for each in command]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.keys() >= {"schema_version", "command", "quantcli", "models", "layers", "gates", "warnings"}
    assert document["schema_version"] == 1 and document["command"] == "convert"
    source, artifact = document["models"]
    keys = {"path", "sha256", "role", "format", "scheme", "size_bytes", "metrics"}
    assert source.keys() >= keys and artifact.keys() >= keys
    assert source["path"] == str(home / "cnn.onnx") and artifact["path"] == str(out)
    assert source["role"] == "reference" and artifact["role"] == "candidate" and artifact["format"] == "onnx"
    assert artifact["metrics"]["size_ratio"] == pytest.approx(artifact["size_bytes"] / source["size_bytes"])
    assert artifact["metrics"]["output_sqnr_db"] > 25
    for layer in document["layers"]:
        assert layer.keys() >= {"name", "scheme", "sqnr_db", "bytes_before", "bytes_after"}
    assert {layer["name"] for layer in document["layers"]} >= {"stem.weight", "body.weight", "head.weight"}


def test_metadata_of_the_model_is_kept(home: Path, tmp_path: Path) -> None:
    proto = cnn()
    proto.metadata_props.add(key="classes", value="cat,dog")
    onnx.save(proto, tmp_path / "m.onnx")
    convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme="int8")
    assert ir.load(tmp_path / "o.onnx").metadata_props["classes"] == "cat,dog"


def test_a_model_that_the_runtime_cannot_run_is_no_defect_of_ours(tmp_path: Path) -> None:
    nodes = [node("Reshape", ["x", "s"], ["h"]), node("MatMul", ["h", "w"], ["y"])]
    path = saved(tmp_path, nodes, ["n", 64], s=np.array([7, 64]), w=normal(64, 64))
    np.savez(tmp_path / "d.npz", x=normal(4, 64))
    with pytest.raises(InputError, match="could not run"):
        convert(path, tmp_path / "o.onnx", scheme="int8-static", data=tmp_path / "d.npz")


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "int8-dynamic", "int8-static"])
@pytest.mark.parametrize("name", ["cnn", "encoder"])
def test_half_precision_models(tmp_path: Path, name: str, scheme: str) -> None:
    onnx.save(halved({"cnn": cnn, "encoder": encoder}[name]()), tmp_path / "half.onnx")
    fed = {key: each.astype(np.float16) if key == "x" else each for key, each in feeds(name).items()}
    np.savez(tmp_path / "d.npz", **fed)
    report = convert(tmp_path / "half.onnx", tmp_path / "o.onnx", scheme=scheme, data=tmp_path / "d.npz")
    assert report.details["verified"]["compared"]["sqnr_db"] > SNR["int4"]
    assert [str(port.dtype) for port in open_onnx(tmp_path / "o.onnx").outputs] == ["float16"]


def test_what_an_interrupted_run_left_is_no_obstacle(home: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.onnx.partial"
    (left / "out").mkdir(parents=True)
    (left / "hessians").mkdir()
    (left / "out" / "stray.onnx").write_text("half")
    (left / "journal.jsonl").write_text('{"fingerprint": "other"}\n')
    convert(home / "encoder.onnx", tmp_path / "out.onnx", scheme="int4", algorithm="gptq", data=home / "encoder.npz")
    untouched(tmp_path, "out.onnx")


def test_a_manifest_replaces_that_of_an_earlier_cast(home: Path, tmp_path: Path) -> None:
    convert(home / "encoder.onnx", tmp_path / "half.onnx", scheme="fp16")
    convert(tmp_path / "half.onnx", tmp_path / "small.onnx", scheme="int8")
    props = onnx.load(tmp_path / "small.onnx").metadata_props
    entries = [(each.key, json.loads(each.value)["scheme"]) for each in props]
    assert entries == [("quantcli", "int8")]


def test_the_reference_runs_once_for_any_number_of_candidates(home: Path, tmp_path: Path) -> None:
    reference = home / "encoder.onnx"
    for scheme in ("int8", "int4"):
        convert(reference, tmp_path / f"{scheme}.onnx", scheme=scheme)
    samples = [Sample({"ids": row[None]}) for row in feeds("encoder", 4)["ids"]]
    comparison = OutputComparison(reference, lambda: [(sample.inputs, 1) for sample in samples[:3]], tmp_path)
    first, again = comparison.against(tmp_path / "int8.onnx"), comparison.against(tmp_path / "int8.onnx")
    reference.rename(tmp_path / "moved.onnx")
    try:
        other = comparison.against(tmp_path / "int4.onnx")
    finally:
        (tmp_path / "moved.onnx").rename(reference)
    assert first.samples == again.samples == other.samples == 3
    assert first.sqnr_db == again.sqnr_db and first.speed and again.speed is None
    ours, theirs = (
        np.stack([Session(path).run(sample.inputs)["y"] for sample in samples[:3]]).astype(np.float64)
        for path in (reference, tmp_path / "int4.onnx")
    )
    expected = 10 * np.log10(np.square(ours).sum() / np.square(ours - theirs).sum())
    assert other.sqnr_db == pytest.approx(expected)


@pytest.mark.parametrize(
    ("model", "output", "implied"),
    [
        ("folder", "out.onnx", "onnx"),
        ("folder", "OUT.ONNX", "onnx"),
        ("model.safetensors", "out.gguf", "gguf"),
        ("folder", "out", None),
        # What is ONNX already, or becomes it always, needs no word.
        ("model.onnx", "out.onnx", None),
        ("program.pt2", "out.onnx", None),
        ("package.module:function", "out.onnx", None),
    ],
)
def test_the_name_of_an_output_stands_for_its_format(model: str, output: str, implied: str | None) -> None:
    assert implied_format(model, Path(output)) == implied
