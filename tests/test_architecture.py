"""The house rules: imports point down, heavy libraries load late, modules stay small, options are documented."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

from quantcli import plugins
from quantcli.cli import app, main

PACKAGE = Path(plugins.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

#: A module, or a folder of plug-ins, imports only what stands in a row above its own.
TIERS = (
    (
        "calibration", "errors", "leaks", "machine", "memory", "parallel", "progress", "ranges", "timing", "units",
        "version",
    ),
    ("functions", "scheme"),
    ("numerics", "packing"),
    ("algorithms", "checkpoints", "data", "formats", "metrics", "observers", "plugins", "report", "roles", "staging"),
    ("coded", "statistics_file"),
    ("statistics",),
    ("gates", "images", "models", "recipe", "tables"),
    ("plots", "steps"),
    ("html", "layerwise", "objective", "plan", "tables_bench", "tables_onnx"),
    ("graph", "training"),
    ("arrays", "artifact", "fused", "runtime_check", "sessions"),
    ("sources", "targets"),
    ("texts",),
    ("samples",),
    ("proof", "runners", "taps"),
    ("graph_layerwise", "probe", "streaming", "subject", "tasks", "traceable"),
    ("sequential", "training_data"),
    ("export", "placing", "training_checkpoint", "training_onnx", "verify"),
    ("calibrated", "collect", "evaluation_data", "hessians", "repack"),
    ("calibrate",),
    ("onnx_advice", "onnx_rows", "repack_onnx"),
    ("conversion", "conversion_rows", "convert_onnx"),
    ("bench_data", "convert", "inspect_onnx"),
    ("bench", "evaluate", "inspect", "options", "ui"),
    ("cli",),
    ("__main__",),
)  # fmt: skip
TIER = {name: number for number, names in enumerate(TIERS) for name in names}
PLUGIN_FOLDERS = ("algorithms", "checkpoints", "formats")

HEAVY = {
    "torch", "transformers", "onnx", "onnxruntime", "numpy", "compressed_tensors", "bitsandbytes", "pyarrow",
    "matplotlib",
}  # fmt: skip

#: The options of the command line's contract, and those that every command has.
COMMON = {"--json", "--markdown", "--html", "--quiet", "--debug", "--help"}
CONTRACT = {
    "calibrate": {
        "--data", "--output", "--method", "--samples", "--batch-size", "--seq-len", "--seed", "--tokenizer",
        "--preprocess", "--weights", "--force",
    },
    "inspect": {"--scheme", "--layers"},
    "convert": {
        "--output", "--scheme", "--format", "--algorithm", "--recipe", "--group-size", "--skip", "--rest", "--target",
        "--calibration", "--data", "--samples", "--seq-len", "--seed", "--tokenizer", "--preprocess", "--weights",
        "--device", "--threads", "--max-memory", "--dry-run", "--force",
    },
    "eval": {
        "--data", "--task", "--samples", "--seq-len", "--tokenizer", "--preprocess", "--weights", "--by-layer",
        "--require", "--junit",
    },
    "bench": {
        "--data", "--batch-size", "--seq-len", "--tokenizer", "--preprocess", "--weights", "--threads", "--runs",
        "--require", "--junit",
    },
}  # fmt: skip


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    """Full names of what a module imports, at the top, in functions and for type checkers alike."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(name: str) -> str:
    """The module or folder of quantcli that a name belongs to."""
    found = name.split(".")[1]
    return "version" if found == "__version__" else found


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__.py"])
def test_imports_point_down(module: str) -> None:
    own = module.removesuffix(".py").split("/")[0]
    for name in imports(module):
        if name.startswith("quantcli.") and not (part(name) == own and own in (*PLUGIN_FOLDERS, "graph", "sequential")):
            assert TIER[part(name)] < TIER[own], f"{module} imports {name}"


@pytest.mark.parametrize("folder", PLUGIN_FOLDERS)
def test_plugins_know_only_the_common_nouns(folder: str) -> None:
    allowed = {folder, *(name for names in TIERS[:3] for name in names)}
    for module in MODULES:
        if module.startswith(f"{folder}/"):
            assert {part(name) for name in imports(module) if name.startswith("quantcli.")} <= allowed, module


@pytest.mark.parametrize(
    ("library", "importers"),
    [("typer", {"cli.py", "options.py"}), ("rich", {"ui.py"}), ("matplotlib", {"plots.py"}), ("click", set())],
)
def test_sole_importers(library: str, importers: set[str]) -> None:
    found = {module for module in MODULES if any(name.split(".")[0] == library for name in imports(module))}
    assert found == importers


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_small_and_silent(module: str) -> None:
    assert len((PACKAGE / module).read_text(encoding="utf-8").splitlines()) <= 400
    calls = {ast.unparse(node.func) for node in ast.walk(tree(module)) if isinstance(node, ast.Call)}
    if module not in ("ui.py", "cli.py", "runtime_check.py"):
        assert "print" not in calls
    if module != "__main__.py":
        assert not calls & {"sys.exit", "exit", "quit", "os._exit"}


@pytest.mark.parametrize(
    "command",
    ["--version", "--help", "convert --help", "inspect", "inspect --scheme int4", "inspect --scheme nf4 --json"],
)
def test_headers_and_help_need_no_heavy_library(tmp_path: Path, command: str) -> None:
    save_file({"layer.weight": torch.zeros(64, 128)}, tmp_path / "model.safetensors")
    first, *options = command.split()
    arguments = [first, *([str(tmp_path)] if first == "inspect" else []), *options]
    code = """if True:
        import json, sys
        from quantcli.cli import main
        status = main(sys.argv[1:])
        print(json.dumps([status, *sys.modules]))"""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    status, *loaded = json.loads(done.stdout.splitlines()[-1])
    assert status == 0
    assert not HEAVY & set(loaded)


def test_the_package_itself_is_light_and_its_functions_are_functions() -> None:
    code = """if True:
        import sys, quantcli
        assert not {'torch', 'numpy', 'pydantic', 'typer'} & set(sys.modules)
        import quantcli.bench, quantcli.calibrate, quantcli.convert, quantcli.inspect, quantcli.evaluate
        from quantcli import bench, calibrate, convert, evaluate, inspect
        functions = [bench, calibrate, convert, evaluate, inspect, quantcli.convert]
        print([f.__name__ for f in functions], sorted(quantcli.__all__))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    functions = ["bench", "calibrate", "convert", "evaluate", "inspect"]
    assert done.stdout == f"{[*functions, 'convert']} {['__version__', *functions]}\n"


def test_every_command_and_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert commands.keys() == CONTRACT.keys()
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for name, command in commands.items():
        assert f"\n  {name} " in overview
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        options = {parameter.opts[0] for parameter in command.params if parameter.opts[0].startswith("--")}
        assert options | {"--help"} == CONTRACT[name] | COMMON
        assert all(parameter.help for parameter in command.params)
        assert all(f" {option} " in text for option in options)


def parameters(function: object) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        *((module, plugins.Algorithm) for module in plugins.ALGORITHMS.values()),
        *((plugins.ALGORITHMS[name], plugins.Rounding) for name in ("rtn", "mse")),
        *((module, plugins.Format) for module in plugins.FORMATS.values()),
        *((module, plugins.CodedFormat) for module in plugins.FORMATS.values() if not module.endswith("safetensors")),
    ],
)  # fmt: skip
def test_plugins_offer_what_their_protocol_says(name: str, protocol: type) -> None:
    module = import_module(name)
    functions = {
        key: value for base in protocol.__mro__ for key, value in vars(base).items() if inspect.isfunction(value)
    }
    wanted = {key: value for key, value in functions.items() if not key.startswith("_")}
    assert wanted
    for key, value in wanted.items():
        assert parameters(getattr(module, key)) == parameters(value), key
    assert all(hasattr(module, key) for key in protocol.__annotations__)


def test_formats_are_named_as_in_the_table() -> None:
    assert all(plugins.output_format(name).NAME == name for name in plugins.FORMATS)  # noqa: SIM300
