"""A task from outside the package, with a metric of its own, works from the command line like those inside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.tiny_onnx import classifier, weights

from quantcli.cli.app import main
from quantcli.evaluation import tasks
from quantcli.reporting.metric_labels import METRICS

TASK = """
import numpy as np

from quantcli.models.outputs import paired

NAME = "largest-error"
METRICS, CANDIDATE_METRICS = (), ("largest_error",)
DEFAULT_SAMPLES, LOADING, WINDOWS, NEEDS_LABELS = 3, {}, True, False


def scorer(model, reference):
    return LargestError(model.path)


class LargestError:
    def __init__(self, name):
        self.name, self.errors = name, []

    def add(self, feeds, label, outputs, reference):
        if reference is not None:
            for ours, theirs in paired(reference, outputs, self.name).values():
                self.errors.append(float(np.abs(ours - theirs).max()))

    def metrics(self):
        return {"largest_error": max(self.errors)} if self.errors else {}

    def details(self):
        return {}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    (tmp_path / "own_task.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(tasks.TASKS, "largest-error", "own_task")
    monkeypatch.setitem(METRICS, "largest_error", ("Largest error", "{:.3f}"))
    weight, bias = weights()
    classifier(tmp_path / "reference.onnx", weight, bias)
    classifier(tmp_path / "candidate.onnx", weight, bias + np.arange(7, dtype=np.float32) / 8)
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((5, 8), np.float32))

    def run(*flags: str) -> tuple[int, str]:
        paths = [str(tmp_path / name) for name in ("reference.onnx", "candidate.onnx", "data.npz")]
        status = main(["eval", *paths[:2], "--data", paths[2], *flags])
        return status, "".join(capsys.readouterr())

    return run


def test_a_task_of_ones_own_with_its_metric(run: Callable[..., tuple]) -> None:
    status, out = run("--task", "largest-error", "--require", "largest_error <= 0.8", "--json")
    report = json.loads(out)
    assert status == 0 and report["gates"][0]["passed"]
    assert (report["task"], report["samples"]) == ("largest-error", 3)
    assert report["models"][1]["metrics"]["largest_error"] == pytest.approx(0.75, abs=1e-5)
    assert "Largest error" in run("--task", "largest-error")[1]


def test_its_gate_fails_and_its_names_are_checked(run: Callable[..., tuple]) -> None:
    assert run("--task", "largest-error", "--require", "largest_error < 0.7")[0] == 1
    status, out = run("--task", "largest-error", "--require", "top1 > 0.5")
    assert status == 2 and "largest_error" in out
    status, out = run("--task", "largest-eror")
    assert status == 2 and "Did you mean 'largest-error'?" in out


def test_every_task_holds_what_it_must() -> None:
    for name in tasks.TASKS:
        task = tasks.task_of(name)
        assert name == task.NAME
        assert all(metric in METRICS or metric.endswith("_se") for metric in (*task.METRICS, *task.CANDIDATE_METRICS))
