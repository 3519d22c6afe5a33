"""examples/ci: the Makefile redoes what it must and nothing else; steps of the workflow and one-liners run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.tiny_onnx import classifier

ROOT = Path(__file__).parents[1]
CI = ROOT / "examples" / "ci"
#: Steps of the Makefile by what their command lines begin with.
_STEP = re.compile(r"^quantcli (\w+)", re.MULTILINE)

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def filled(folder: Path) -> Path:
    """A working directory with what the examples expect: a model that tells its classes well apart."""
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((64, 96)).astype(np.float32), np.zeros(96, np.float32)
    classifier(folder / "model.onnx", weight, bias)
    for name in ("calibration", "test"):
        labels = rng.integers(0, 96, 200)
        inputs = weight.T[labels] + 0.1 * rng.standard_normal((200, 64)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=inputs.astype(np.float32), labels=labels)
    shutil.copy(CI / "Makefile", folder)
    tools = folder / "bin"
    tools.mkdir()
    command = tools / "quantcli"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m quantcli "$@"\n')
    command.chmod(0o755)
    return folder


def shell(folder: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for name in ("MAKEFLAGS", "MFLAGS", "GITHUB_STEP_SUMMARY"):
        environment.pop(name, None)
    return subprocess.run(
        command, cwd=folder, env=environment | more, capture_output=True, text=True, check=False, timeout=1200
    )


def would_run(folder: Path, *arguments: str) -> list[str]:
    """Steps that make would take, without taking them."""
    done = shell(folder, "make", "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    return _STEP.findall(done.stdout)


@needs_make
def test_what_make_would_do_at_first(tmp_path: Path) -> None:
    filled(tmp_path)
    assert would_run(tmp_path) == ["inspect", "calibrate", "convert", "eval", "bench"]
    assert would_run(tmp_path, "inspect") == ["inspect"]


@needs_make
@pytest.mark.slow
def test_make_redoes_what_changed_and_nothing_else(tmp_path: Path) -> None:
    filled(tmp_path)
    build = tmp_path / "build"
    done = shell(tmp_path, "make")
    assert done.returncode == 0, done.stderr
    assert _STEP.findall(done.stdout) == ["inspect", "calibrate", "convert", "eval", "bench"]
    made = {path.name for path in build.iterdir()}
    assert {"int8.onnx", "inspect.html", "convert.html", "eval.html", "eval.xml", "bench.html", "bench.json"} <= made
    before = {path.name: path.read_bytes() for path in build.iterdir()}

    again = shell(tmp_path, "make")
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout
    assert shell(tmp_path, "make", "--question").returncode == 0
    assert {path.name: path.read_bytes() for path in build.iterdir()} == before

    everything = ["inspect", "calibrate", "convert", "eval", "bench"]
    for changed, steps in (
        ("model.onnx", everything),
        ("calibration.npz", everything[1:]),
        ("test.npz", everything[3:]),
    ):
        assert would_run(tmp_path, f"--what-if={changed}") == steps, changed

    # A gate that fails: no target, but its report; make goes on from there.
    (tmp_path / "test.npz").touch()
    failed = shell(tmp_path, "make", 'eval_FLAGS=--require "top1 >= 2"')
    assert failed.returncode != 0
    assert not (build / "eval.json").exists()
    assert "FAILED" in (build / "eval.html").read_text()
    assert "failure" in (build / "eval.xml").read_text()
    assert (build / "int8.onnx").read_bytes() == before["int8.onnx"]
    assert would_run(tmp_path) == ["eval", "bench"]

    # What is accepted is what later runs are compared with.
    assert shell(tmp_path, "make", "accept").returncode == 0
    assert would_run(tmp_path) == ["eval", "bench"]
    done = shell(tmp_path, "make", "eval")
    assert done.returncode == 0, done.stderr
    report = json.loads((build / "eval.json").read_text())
    assert report["baseline"]["path"] == "baseline.json"
    assert [gate["require"] for gate in report["gates"]] == ["top1_drop <= 0.005", "size_ratio <= 1.01"]
    assert would_run(tmp_path, "bench_FLAGS=--runs 21") == ["bench"]


def steps() -> list[dict[str, str]]:
    workflow = yaml.safe_load((CI / "quantize.yml").read_text())
    (job,) = workflow["jobs"].values()
    return job["steps"]


def test_actions_of_the_workflow_are_pinned_by_commit() -> None:
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name) for name in used)
    upload = next(step for step in steps() if step.get("uses", "").startswith("actions/upload-artifact"))
    assert upload["if"] == "always()"


@needs_make
@pytest.mark.slow
def test_steps_of_the_workflow_run(tmp_path: Path) -> None:
    filled(tmp_path)
    workflow = yaml.safe_load((CI / "quantize.yml").read_text())
    runs = [step["run"] for step in steps() if "run" in step]
    assert len(runs) == 6
    summary = tmp_path / "summary.md"
    for run in runs:
        # As GitHub runs them.
        done = shell(
            tmp_path, "bash", "-e", "-o", "pipefail", "-c", run, **workflow["env"], GITHUB_STEP_SUMMARY=str(summary)
        )
        assert done.returncode == 0, f"{run}: {done.stderr}"
    assert summary.read_text().count("## quantcli") == 5
    upload = next(step for step in steps() if step.get("uses", "").startswith("actions/upload-artifact"))
    for pattern in upload["with"]["path"].split():
        assert list(tmp_path.glob(pattern)), pattern


@pytest.mark.slow
def test_every_line_runs(tmp_path: Path) -> None:
    done = shell(filled(tmp_path), "bash", str(CI / "one-liners.sh"))
    assert done.returncode == 0, done.stderr
    assert "same model" in done.stdout
    for name in ("eval.xml", "eval.html", "baseline.json", "bench.md"):
        assert (tmp_path / name).stat().st_size, name


def test_one_liners_are_one_line_each() -> None:
    lines = (CI / "one-liners.sh").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set "))]
    assert len(commands) >= 6
    assert not any(line.endswith("\\") for line in commands)
