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

import quantcli
from quantcli import algorithms, formats
from quantcli.algorithms.base import Algorithm, CalibratedRounding, Rounding, Transform
from quantcli.cli.app import app, main
from quantcli.formats.base import Format, QuantizedFormat

PACKAGE = Path(quantcli.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

#: Bottom to top: a room imports only itself and the rooms in lines above its own.
ORDER = (
    ("errors", "version"),
    ("system",),
    ("core",),
    ("reporting",),
    ("formats", "algorithms"),
    ("checkpoint",),
    ("planning",),
    ("onnx",),
    ("models",),
    ("data",),
    ("export",),
    ("calibration",),
    ("blocks",),
    ("ptq",),
    ("training",),
    ("conversion",),
    ("evaluation", "benchmarking"),
    ("search",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

#: Inside a room, likewise: the parts of ``onnx``, where execution and rewrite do not know each other.
ONNX_ORDER = {"graph": 0, "plan": 1, "weights": 2, "rewrite": 3, "execution": 3}

#: Siblings that never import each other.
APART = ("conversion/checkpoint", "conversion/onnx"), ("onnx/rewrite", "onnx/execution")

#: In a family of plug-ins, what its members may import of each other.
SHARED = {
    "formats": {"base", "module_patterns"},
    "algorithms": {"base", "rtn", "mse", "fake_quantize"},
}

HEAVY = {
    "torch", "transformers", "onnx", "onnxruntime", "numpy", "compressed_tensors", "bitsandbytes", "pyarrow",
    "matplotlib", "gguf", "xllamacpp",
}  # fmt: skip

#: The options of the command line's contract, and those that every command has.
COMMON = {"--custom-ops", "--json", "--markdown", "--html", "--quiet", "--debug", "--help"}
CONTRACT = {
    "calibrate": {
        "--data", "--output", "--method", "--samples", "--batch-size", "--seq-len", "--seed", "--tokenizer",
        "--preprocess", "--weights", "--force",
    },
    "inspect": {"--scheme", "--layers"},
    "convert": {
        "--output", "--scheme", "--format", "--algorithm", "--recipe", "--group-size", "--skip", "--rest", "--target",
        "--calibration", "--data", "--samples", "--seq-len", "--seed", "--tokenizer", "--preprocess", "--weights",
        "--device", "--threads", "--max-memory", "--verify", "--dry-run", "--force", "--allow-larger",
        "--max-size", "--max-drop", "--metric", "--eval-data", "--max-kl", "--max-latency-p50", "--allow",
        "--sensitivity", "--search-time", "--pareto",
    },
    "eval": {
        "--data", "--task", "--samples", "--seq-len", "--tokenizer", "--preprocess", "--weights", "--by-layer",
        "--require", "--baseline", "--junit",
    },
    "bench": {
        "--data", "--batch-size", "--seq-len", "--tokenizer", "--preprocess", "--weights", "--threads", "--runs",
        "--require", "--baseline", "--junit",
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


def own_imports(module: str) -> Iterator[tuple[str, list[str]]]:
    """What a module imports of quantcli: the full name, and the path below the package."""
    for name in imports(module):
        if name.startswith("quantcli."):
            below = name.split(".")[1:]
            yield name, ["version"] if below == ["__version__"] else below


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__.py"])
def test_imports_point_down(module: str) -> None:
    path = module.removesuffix(".py").split("/")
    for name, below in own_imports(module):
        if below[0] != path[0]:
            assert LEVEL[below[0]] < LEVEL[path[0]], f"{module} imports {name}"
        elif path[0] == "onnx" and len(path) > 2 and below[1] != path[1]:
            assert ONNX_ORDER[below[1]] < ONNX_ORDER[path[1]], f"{module} imports {name}"


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {module.removesuffix(".py").split("/")[0] for module in MODULES} - {"__init__"}
    assert rooms == LEVEL.keys()
    assert len(LEVEL) == sum(len(line) for line in ORDER)


@pytest.mark.parametrize(("one", "other"), [*APART, *(pair[::-1] for pair in APART)])
def test_siblings_stay_apart(one: str, other: str) -> None:
    for module in MODULES:
        if module.startswith(f"{one}/"):
            assert not [n for n, below in own_imports(module) if "/".join(below).startswith(f"{other}/")], module


@pytest.mark.parametrize("family", SHARED)
def test_plugins_share_only_their_base(family: str) -> None:
    for module in MODULES:
        path = module.removesuffix(".py").split("/")
        if path[0] == family and path[1] != "__init__":
            used = {below[1] for _, below in own_imports(module) if below[0] == family}
            assert used - {path[1]} <= SHARED[family], module


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("commands/")])
def test_commands_do_not_call_each_other(module: str) -> None:
    commands = {"inspect", "calibrate", "convert", "evaluate", "bench"}
    used = {below[1] for _, below in own_imports(module) if below[0] == "commands"}
    assert not used & (commands - {Path(module).stem})


@pytest.mark.parametrize(
    ("library", "importers"),
    [
        (
            "typer",
            {f"cli/{name}.py" for name in ("app", "commands", "completion", "help", "needs", "options", "output")},
        ),
        ("shellingham", {"cli/completion.py"}),
        ("rich", {"cli/terminal.py"}),
        ("click", set()),
        (
            "matplotlib",
            {f"reporting/charts/{name}.py" for name in ("base", "latency", "layers", "pareto", "sizes", "training")}
            | {"reporting/charts/histograms.py"},
        ),
        ("onnxruntime", {"models/session.py"}),
        (
            "transformers",
            {"models/hugging_face.py", "models/stored_parameters.py"}
            | {f"conversion/checkpoint/{name}.py" for name in ("loader_load", "loader_rows", "loader_survey")},
        ),
        ("psutil", {"system/hardware.py"}),
        ("gguf", {"checkpoint/gguf/checkpoint.py", "conversion/checkpoint/gguf_file.py"}),
        ("xllamacpp", {"conversion/checkpoint/llama_cpp.py"}),
        ("subprocess", {"system/child.py"}),
    ],
)
def test_sole_importers(library: str, importers: set[str]) -> None:
    found = {module for module in MODULES if any(name.split(".")[0] == library for name in imports(module))}
    assert found == importers


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_small_and_silent(module: str) -> None:
    assert len((PACKAGE / module).read_text(encoding="utf-8").splitlines()) <= 400
    calls = {ast.unparse(node.func) for node in ast.walk(tree(module)) if isinstance(node, ast.Call)}
    if module != "cli/terminal.py":
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
        from quantcli.cli.app import main
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
        from quantcli.commands import bench, calibrate, convert, evaluate, inspect
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
    assert all(f"  {option} " in overview for option in ("--version", "--install-completion", "--show-completion"))
    for name, command in commands.items():
        assert f"\n  {name} " in overview
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        options = {parameter.opts[0] for parameter in command.params if parameter.opts[0].startswith("--")}
        assert options | {"--help"} == CONTRACT[name] | COMMON
        assert all(parameter.help for parameter in command.params)
        assert all(f" {option} " in text for option in options)


#: What an algorithm of each kind offers; what trains is run by the room for that.
KINDS = {
    "rounding": Rounding,
    "calibrated rounding": CalibratedRounding,
    "transform": Transform,
    "training": Algorithm,
}


def test_kinds_say_which_algorithms_need_data() -> None:
    for name in algorithms.ALGORITHMS:
        assert algorithms.needs_no_data(name) == (not algorithms.algorithm(name).NEEDS), name


def parameters(function: object) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        *((entry.module, Algorithm) for entry in algorithms.ALGORITHMS.values()),
        *((entry.module, KINDS[kind]) for entry in algorithms.ALGORITHMS.values() for kind in entry.kinds),
        *((entry.module, Format) for entry in formats.FORMATS.values()),
        *((entry.module, QuantizedFormat) for name, entry in formats.FORMATS.items() if name != "safetensors"),
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
    assert all(formats.output_format(name).NAME == name for name in formats.FORMATS)  # noqa: SIM300
