"""A candidate that cannot keep a limit any more is not run on all samples, and one that can is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.fragile_nets import products, samples, saved

from quantcli.core.ports import Arrays, Port
from quantcli.data.request import DataRequest
from quantcli.evaluation.inputs import Inputs, load_inputs
from quantcli.models.source import ModelSource, open_model
from quantcli.search.budget import Budget
from quantcli.search.judge import Judged, judge
from quantcli.search.onnx_measured import Measurements
from quantcli.search.onnx_subject import GraphSubject
from quantcli.search.onnx_trials import Trials, Verdicts
from quantcli.search.sensitivity_file import SensitivityStore

COUNT = 600


class Scores:
    """A model that returns fixed scores, but for samples whose class it turns."""

    def __init__(self, wrong: set[int]) -> None:
        self.inputs: tuple[Port, ...] = ()
        self.wrong, self.runs = wrong, 0

    def run(self, feeds: Arrays) -> Arrays:
        """Two classes, the first of which is right."""
        scores = np.array([[0.0, 1.0] if self.runs in self.wrong else [1.0, 0.0]], np.float32)
        self.runs += 1
        return {"logits": scores}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, proto = tmp_path_factory.mktemp("judged"), products(2)
    return saved(proto, folder / "net.onnx"), samples(proto, folder / "held_out.npz", COUNT)


def inputs_of(model: Path, data: Path) -> tuple[ModelSource, Inputs]:
    source = open_model(str(model))
    return source, load_inputs([source], DataRequest(str(data)).at_most(COUNT), None)


def breaks(limit: float, judged: Judged) -> bool:
    return judged.drops(at_best=True)["argmax_agreement"].bound > limit


@pytest.mark.parametrize(("every", "runs"), [(10, 64), (1000, COUNT)])
def test_a_candidate_is_given_up_once_its_limit_is_out_of_reach(
    held_out: tuple[Path, Path], every: int, runs: int
) -> None:
    source, inputs = inputs_of(*held_out)
    candidate = Scores(set(range(0, COUNT, every)))
    judged = judge(source, Scores(set()), candidate, inputs, lambda so_far: breaks(0.02, so_far))
    assert candidate.runs == runs == COUNT - judged.unseen
    # What is told of it is of the samples that were run.
    drop = judged.drops()["argmax_agreement"]
    assert drop.samples == runs
    assert drop.mean == pytest.approx(len([n for n in candidate.wrong if n < runs]) / runs)


def measurements(folder: Path, model: Path, data: Path, store: SensitivityStore) -> Measurements:
    from quantcli.planning.recipe import Recipe

    subject = GraphSubject(
        str(model), folder / "out.onnx", Recipe(), None, None, None, ("float", "int4"), str(data), None, folder
    )
    return Measurements(subject, store)


def test_what_was_given_up_is_judged_again_only_where_a_limit_is_wide_enough(
    held_out: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantcli.planning.recipe import Recipe

    counts: list[int] = []

    def of(self: Verdicts, path: Path, is_hopeless: object) -> Judged:
        candidate = Scores(set(range(0, COUNT, 20)))
        found = judge(self.source, Scores(set()), candidate, self.held_out, is_hopeless)  # type: ignore[arg-type]
        counts.append(candidate.runs)
        return found

    monkeypatch.setattr(Verdicts, "of", of)
    recipe = Recipe(scheme="int4", group_size=16)
    measured = measurements(tmp_path, *held_out, SensitivityStore(tmp_path / "kept.json", {}))
    assert not measured.keeps(Budget(max_drop=0.01), recipe)
    assert counts and counts[0] < COUNT
    monkeypatch.setattr(Trials, "of", None)  # what is known takes no artifact
    again = measurements(tmp_path, *held_out, SensitivityStore(tmp_path / "kept.json", {}))
    assert again.verdict(Budget(max_drop=0.01), recipe) is False
    assert not again.keeps(Budget(max_drop=0.008), recipe)
    assert again.row(recipe)["given_up_after"] == counts[0]
    assert again.verdict(Budget(max_drop=0.2), recipe) is None
    monkeypatch.undo()
    monkeypatch.setattr(Verdicts, "of", of)
    assert again.keeps(Budget(max_drop=0.2), recipe)
    assert again.subject.evidence is not None
    assert counts == [counts[0], len(again.subject.evidence.held_out)]
    assert "given_up_after" not in again.row(recipe)
    # All samples were run now, so that a narrow limit takes no other run.
    assert not again.keeps(Budget(max_drop=0.01), recipe)
    assert len(counts) == 2
