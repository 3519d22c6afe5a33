"""Libraries of custom operators: every session of a command has those that the user names, and no others."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.graphs import model, node

from quantcli import convert
from quantcli.cli.app import main
from quantcli.models import custom_operators
from quantcli.models.session import Session

#: Counts its calls in a file beside it; onnxruntime takes a null pointer for success.
_SOURCE = """
#include <stdio.h>
const char *PLACE = "%s";
void *RegisterCustomOps(void *options, const void *api) {
    FILE *calls = fopen(PLACE, "a");
    fputs("x", calls);
    fclose(calls);
    return 0;
}
"""


@pytest.fixture(autouse=True)
def _none_left() -> Iterator[None]:
    yield
    custom_operators.register(())


@pytest.fixture
def library(tmp_path: Path) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build a library with")
    (tmp_path / "ops.c").write_text(_SOURCE % (tmp_path / "calls"), encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "ops.so", tmp_path / "ops.c"], check=True)
    return tmp_path / "ops.so"


def product(tmp_path: Path) -> Path:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    path = tmp_path / "m.onnx"
    onnx.save(model([node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 64]}, {"y": None}, {"w": weight}), path)
    return path


def calls(library: Path) -> int:
    """How often the library was registered; forgets it."""
    place = library.with_name("calls")
    count = len(place.read_text(encoding="utf-8")) if place.exists() else 0
    place.unlink(missing_ok=True)
    return count


def test_every_command_registers_it(tmp_path: Path, library: Path) -> None:
    path, data = product(tmp_path), tmp_path / "x.npz"
    np.savez(data, x=np.ones((4, 64), np.float32))
    out, again = str(tmp_path / "o.onnx"), str(tmp_path / "s.onnx")
    stats = str(tmp_path / "s.safetensors")
    commands = [
        (["inspect", str(path)], 1),
        (["calibrate", str(path), "--data", str(data), "-o", stats], 2),
        (["convert", str(path), "--scheme", "int8", "-o", out], 2),
        (["convert", str(path), "--scheme", "int8-static", "--data", str(data), "-o", again], 4),
        (["eval", str(path), out, "--data", str(data)], 3),
        (["eval", str(path), out, "--data", str(data), "--by-layer"], 5),
        # Two sessions here; a check and two sessions in a process of its own for each model.
        (["bench", str(path), out, "--runs", "2"], 1 + 2 + 2 * 3),
    ]
    for arguments, least in commands:
        assert main([*arguments, "--custom-ops", str(library), "--quiet"]) == 0, arguments
        assert calls(library) >= least, arguments
    assert main(["convert", str(path), "--scheme", "int8", "-o", out, "--force", "--quiet"]) == 0
    assert calls(library) == 0, "what one command registers is no matter of the next"


def test_a_library_that_cannot_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text = product(tmp_path), tmp_path / "text.so"
    text.write_text("no library", encoding="utf-8")
    for name, says in [
        (tmp_path / "nowhere.so", "does not exist"),
        (tmp_path, "is not a file"),
        (text, "cannot be loaded as a library of custom operators"),
    ]:
        assert main(["inspect", str(path), "--custom-ops", str(name)]) == 3
        assert says in " ".join(capsys.readouterr().err.split())


def test_a_library_without_operators_of_onnxruntime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build a library with")
    (tmp_path / "other.c").write_text("int other(void) { return 0; }", encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "o.so", tmp_path / "other.c"], check=True)
    assert main(["inspect", str(product(tmp_path)), "--custom-ops", str(tmp_path / "o.so")]) == 3
    assert "RegisterCustomOps" in capsys.readouterr().err


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-dynamic", "fp16"])
def test_operators_of_unknown_domains_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, opset: int
) -> None:
    """No runtime here knows the operator, so what is written is read and not run."""
    held = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    nodes = [node("Mine", ["x", "k"], ["q"], domain="foreign"), node("MatMul", ["q", "w"], ["y"])]
    proto = model(nodes, {"x": ["n", 64]}, {"y": None}, {"k": held, "w": held[::-1].copy()}, opset=opset)
    proto.opset_import.append(onnx.helper.make_opsetid("foreign", 1))
    onnx.save(proto, tmp_path / "m.onnx")
    from quantcli.onnx.graph.model import open_onnx
    from quantcli.onnx.graph.opset import upgrade
    from quantcli.onnx.graph.prepare import prepare
    from quantcli.onnx.plan.evidence import Evidence
    from quantcli.onnx.plan.judge import needed_opset
    from quantcli.onnx.plan.resolve import resolve_graph
    from quantcli.onnx.rewrite.transform import transform
    from quantcli.planning.recipe import validate

    opened, recipe = open_onnx(tmp_path / "m.onnx"), validate({"scheme": scheme}, "test")
    graph = prepare(opened)
    graph = upgrade(graph, needed_opset(resolve_graph(recipe, graph, opened.path)))
    plan = resolve_graph(recipe, graph, opened.path)
    transform(graph, plan, Evidence())
    (mine,) = [each for each in graph.graph if each.domain == "foreign"]
    assert np.array_equal(mine.inputs[1].const_value.numpy(), held)
    assert [each.name for each in plan.nodes if each.form] == ["w"]


def test_a_model_with_an_operator_that_no_library_has(tmp_path: Path) -> None:
    proto = model([node("Mine", ["x"], ["y"], domain="foreign")], {"x": ["n"]}, {"y": None}, {})
    proto.opset_import.append(onnx.helper.make_opsetid("foreign", 1))
    onnx.save(proto, tmp_path / "m.onnx")
    from quantcli.errors import InputError

    with pytest.raises(InputError, match="--custom-ops"):
        Session(tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"m.onnx cannot be loaded by onnxruntime .*--custom-ops"):
        convert(tmp_path / "m.onnx", tmp_path / "o.onnx", scheme="int8", dry_run=True)


@pytest.fixture
def extensions() -> Path:
    """A library of real operators."""
    library = pytest.importorskip("onnxruntime_extensions", reason="a library with operators in it")
    return Path(library.get_library_path())


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4", "int8-dynamic", "int8-static"])
def test_a_graph_converts_around_an_operator_of_a_library(tmp_path: Path, extensions: Path, scheme: str) -> None:
    """The products before and behind it are quantized, and it runs in the artifact: NegPos parts a tensor by sign."""
    drawn = np.random.default_rng(0)
    held = {name: drawn.standard_normal((64, 64)).astype(np.float32) / 8 for name in ("w", "v")}
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("NegPos", ["h"], ["neg", "pos"], domain="ai.onnx.contrib"),
        node("Sub", ["pos", "neg"], ["size"]),
        node("MatMul", ["size", "v"], ["y"]),
    ]
    proto = model(nodes, {"x": ["n", 64]}, {"y": None}, held)
    proto.opset_import.append(onnx.helper.make_opsetid("ai.onnx.contrib", 1))
    onnx.save(proto, tmp_path / "m.onnx")
    x = drawn.standard_normal((40, 64)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    paths = [str(tmp_path / name) for name in ("m.onnx", "o.onnx", "x.npz")]
    convert_it = ["convert", paths[0], "--scheme", scheme, "--data", paths[2], "-o", paths[1], "--quiet"]
    assert main(convert_it) == 3, "no runtime knows the operator by itself"
    assert main([*convert_it, "--custom-ops", str(extensions)]) == 0
    custom_operators.register([extensions])
    (got,) = Session(tmp_path / "o.onnx").run({"x": x}).values()
    expected = np.abs(x @ held["w"]) @ held["v"]
    assert np.square(got - expected).sum() / np.square(expected).sum() < (0.05 if scheme == "int4" else 1e-3)
    stored = {each.name: each.data_type for each in onnx.load(tmp_path / "o.onnx").graph.initializer}
    assert not {name for name in held if stored.get(name) == onnx.TensorProto.FLOAT}
    assert main(["eval", *paths[:2], "--data", paths[2], "--custom-ops", str(extensions), "--quiet"]) == 0
