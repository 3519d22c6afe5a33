"""What training makes small, against its definition: outputs, labels, masks, a loss of one's own; data and options."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantcli.algorithms.qat import Options as QatOptions
from quantcli.core.ports import Port
from quantcli.data.request import DataRequest
from quantcli.data.samples import Samples, load_samples
from quantcli.errors import InputError, UsageError
from quantcli.planning.steps import parse_steps
from quantcli.training import data
from quantcli.training.data import TrainingData, train
from quantcli.training.loop import Defaults
from quantcli.training.objective import Batch, Objective, log_scores

FLOAT, INT64 = np.dtype(np.float32), np.dtype(np.int64)
PORTS = (Port("x", FLOAT, ("n", 4)),)
TOKENS = (Port("ids", INT64, ("n", "length")),)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(labels: list[int] | None = None, size: int = 6, **inputs: Tensor) -> Batch:
    return Batch(list(range(10, 10 + size)), inputs, None if labels is None else torch.tensor(labels))


def objective(*, labelled: bool = False, scores: str | None = "logits", **options: Any) -> Objective:
    return Objective(QatOptions.model_validate(options), labelled=labelled, scores=scores)


def kl(wanted: Tensor, found: Tensor) -> float:
    """Of logits, in float64, summed over classes, and the mean of all rows."""
    p, q = wanted.double().softmax(-1), found.double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


def entropy(logits: Tensor, labels: list[int]) -> float:
    return float(-logits.double().softmax(-1)[range(len(labels)), labels].log().mean())


def test_distillation_is_the_divergence_of_scores() -> None:
    wanted, found = random(6, 5), random(6, 5, seed=1)
    given = objective()
    assert float(given({"logits": found}, {"logits": wanted}, batch())) == pytest.approx(kl(wanted, found), rel=1e-5)
    assert given.describe() == "distillation"
    doubled = objective(distillation=2.0)
    assert float(doubled({"logits": found}, {"logits": wanted}, batch())) == pytest.approx(2 * kl(wanted, found))
    assert float(given({"logits": wanted}, {"logits": wanted}, batch())) == pytest.approx(0, abs=1e-6)


def test_probabilities_are_told_from_logits() -> None:
    wanted, found = random(6, 5), random(6, 5, seed=1)
    given = objective(labelled=True, scores="p")
    labels = [0, 1, 2, 3, 4, 0]
    loss = given({"p": found.softmax(-1)}, {"p": wanted.softmax(-1)}, batch(labels))
    assert float(loss) == pytest.approx(kl(wanted, found) + entropy(found, labels), rel=1e-4)
    certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert bool(torch.isfinite(log_scores(certain)).all())
    torch.testing.assert_close(log_scores(found).exp().sum(-1), torch.ones(6))


def test_other_outputs_count_by_their_relative_error_and_all_of_them_alike() -> None:
    wanted = {"logits": random(6, 5), "features": random(6, 7, 3)}
    found = {"logits": random(6, 5, seed=1), "features": random(6, 7, 3, seed=2)}
    relative = (wanted["features"] - found["features"]).square().sum() / wanted["features"].square().sum()
    expected = (kl(wanted["logits"], found["logits"]) + float(relative)) / 2
    assert float(objective()(found, wanted, batch())) == pytest.approx(expected, rel=1e-5)
    alone = objective(scores=None)({"y": found["features"]}, {"y": wanted["features"]}, batch())
    assert float(alone) == pytest.approx(float(relative), rel=1e-5)


def test_labels_count_by_their_cross_entropy() -> None:
    wanted, found, labels = random(6, 5), random(6, 5, seed=1), [4, 3, 2, 1, 0, 0]
    both = objective(labelled=True, labels=0.5)
    assert both.describe() == "distillation + labels"
    loss = float(both({"logits": found}, {"logits": wanted}, batch(labels)))
    assert loss == pytest.approx(kl(wanted, found) + 0.5 * entropy(found, labels), rel=1e-5)
    alone = objective(labelled=True, distillation=0)
    assert alone.describe() == "labels"
    assert float(alone({"logits": found}, None, batch(labels))) == pytest.approx(entropy(found, labels), rel=1e-5)


@pytest.mark.parametrize("label", [-1, 5, 255])
def test_a_label_that_is_no_class_names_its_sample(label: int) -> None:
    found = {"logits": random(6, 5)}
    with pytest.raises(InputError, match=rf"Sample 13 has the label {label}, .*5 classes, 0 to 4") as caught:
        objective(labelled=True)(found, found, batch([0, 1, label, 3, 4, 0]))
    assert "labels: 0" in (caught.value.hint or "")
    assert float(objective(labelled=True, labels=0)(found, found, batch([9] * 6))) == pytest.approx(0, abs=1e-6)


def test_labels_of_samples_do_not_go_with_scores_of_tokens() -> None:
    found = {"logits": random(6, 7, 5)}
    with pytest.raises(InputError, match=r"one label per sample, and the output logits has scores \[6, 7, 5\]"):
        objective(labelled=True)(found, found, batch([0] * 6))


def test_labels_alone_need_labels_and_classes() -> None:
    with pytest.raises(UsageError, match="the data has no labels"):
        objective(distillation=0)
    with pytest.raises(UsageError, match="no output with scores of classes"):
        objective(labelled=True, scores=None, distillation=0)


def test_padded_tokens_do_not_count() -> None:
    wanted, found = random(2, 7, 5), random(2, 7, 5, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]])
    kept = mask.bool()
    given, of = objective(), batch(size=2, attention_mask=mask)
    assert float(given({"logits": found}, {"logits": wanted}, of)) == pytest.approx(kl(wanted[kept], found[kept]))
    noise = wanted + 100 * (1 - mask).unsqueeze(-1) * random(2, 7, 5, seed=2)
    assert float(given({"logits": noise}, {"logits": wanted}, of)) == pytest.approx(0, abs=1e-6)
    hidden = objective(scores=None)({"hidden": noise}, {"hidden": wanted}, of)
    assert float(hidden) == 0
    tally = given.tally()
    tally.add({"logits": -noise * kept.unsqueeze(-1) + noise * ~kept.unsqueeze(-1)}, {"logits": wanted}, of)
    assert tally.metrics()["top1_agreement"] == 0


def test_a_mask_as_long_as_there_are_classes_is_none_of_these() -> None:
    wanted, found = random(2, 5), random(2, 5, seed=1)
    of = batch(size=2, attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]))
    assert float(objective()({"logits": found}, {"logits": wanted}, of)) == pytest.approx(kl(wanted, found), rel=1e-5)


def test_metrics_are_shares_of_all_samples() -> None:
    wanted, labels = torch.eye(5)[[0, 1, 2, 3]], [0, 1, 1, 1]
    found = torch.eye(5)[[0, 1, 1, 0]]
    for options, labelled, name, right in (
        ({}, True, "top1", 3), ({"labels": 0}, True, "top1_agreement", 2), ({}, False, "top1_agreement", 2),
    ):  # fmt: skip
        given = objective(labelled=labelled, **options)
        tally = given.tally()
        losses = []
        for rows in (slice(0, 3), slice(3, 4)):
            part = batch(labels[rows], len(labels[rows]))
            tally.add({"logits": found[rows]}, {"logits": wanted[rows]}, part)
            losses += [float(given({"logits": found[rows]}, {"logits": wanted[rows]}, part))] * len(part)
        assert tally.metrics() == {"loss": pytest.approx(np.mean(losses)), name: right / 4}
    assert objective().tally().metrics() == {"loss": None}


LOSSES = """
import torch
def mine(*, outputs, original, labels, inputs):
    return ((outputs["logits"] - original["logits"]).abs().mean() + inputs["x"].mean() + labels.sum()).reshape(1)
def fails(**_):
    return 1 / 0
def number(**_):
    return 1.0
def table(*, outputs, **_):
    return outputs["logits"]
def constant(**_):
    return torch.zeros(())
"""


@pytest.fixture
def losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with losses in the current folder."""
    (tmp_path / "own_losses.py").write_text(textwrap.dedent(LOSSES))
    monkeypatch.chdir(tmp_path)


def test_a_loss_of_ones_own(losses: None) -> None:
    own = objective(loss="own_losses:mine", labelled=True)
    wanted, found = random(6, 5), random(6, 5, seed=1).requires_grad_()
    x = random(6, 4)
    loss = own({"logits": found}, {"logits": wanted}, batch([1] * 6, x=x))
    assert loss.shape == () and own.describe() == "own_losses:mine"
    assert float(loss) == pytest.approx(float((wanted - found).abs().mean() + x.mean() + 6))
    loss.backward()  # type: ignore[no-untyped-call]
    assert found.grad is not None and bool((found.grad != 0).all())
    # Where nothing is learned there are no gradients to be had.
    with torch.no_grad():
        assert float(own({"logits": found}, {"logits": wanted}, batch([1] * 6, x=x))) == pytest.approx(float(loss))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fails", "own_losses:fails failed: ZeroDivisionError: division by zero."),
        ("number", "own_losses:number returned float"),
        ("table", "own_losses:table returned a tensor of shape [6, 5]"),
        ("constant", "own_losses:constant returned a tensor of shape [] without gradient"),
    ],
)
def test_losses_that_are_none(losses: None, name: str, says: str) -> None:
    found = {"logits": random(6, 5).requires_grad_()}
    with pytest.raises(InputError) as caught:
        objective(loss=f"own_losses:{name}")(found, found, batch())
    assert says in str(caught.value)


def test_a_loss_that_does_not_exist(losses: None) -> None:
    with pytest.raises(InputError, match="own_losses has no other"):
        objective(loss="own_losses:other")


def samples(folder: Path, ports: tuple[Port, ...] = PORTS, count: int = 10, labels: object = None) -> Samples:
    arrays = {"x": random(count, 4).numpy()} | ({} if labels is None else {"labels": np.asarray(labels)})
    np.savez(folder / "data.npz", **arrays)
    return load_samples(DataRequest(str(folder / "data.npz")), ports, folder=None)


def test_batches_are_of_the_samples_asked_for_in_order(tmp_path: Path) -> None:
    data = TrainingData(samples(tmp_path, labels=np.arange(10) % 3), torch.device("cpu"))
    (found,) = data.batches([7, 2, 5])
    assert found.numbers == [2, 5, 7] and len(found) == 3 and data.labelled
    assert torch.equal(found.inputs["x"], random(10, 4)[[2, 5, 7]])
    assert found.labels is not None and found.labels.tolist() == [2, 2, 1] and found.labels.dtype == torch.int64
    plain = TrainingData(samples(tmp_path), torch.device("cpu"), lambda inputs: {"y": inputs["x"] * 2})
    (found,) = plain.batches([0])
    assert found.labels is None and not plain.labelled and found.inputs.keys() == {"y"}


def test_a_fixed_number_of_samples_at_a_time(tmp_path: Path) -> None:
    given = samples(tmp_path, (Port("x", FLOAT, (4, 4)),))
    data = TrainingData(given, torch.device("cpu"))
    assert len(data) == 8 and data.fixed_batch == 4 and "last 2 are left" in given.warnings[0]
    assert [len(each) for each in data.batches(range(8))] == [4, 4]


GENERATORS = """
import numpy as np
calls = 0
def dry():
    global calls
    calls += 1
    for number in range(10 if calls == 1 else 7):
        yield {"x": np.ones((1, 4), np.float32)}
def ragged():
    for number in range(12):
        yield {"ids": np.full((1, 3 + number % 2), number)}
def masked():
    for sample in ragged():
        yield sample | {"attention_mask": np.ones_like(sample["ids"])}
"""


@pytest.fixture
def generators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module with functions that yield samples in the current folder."""
    (tmp_path / "own_samples.py").write_text(textwrap.dedent(GENERATORS))
    monkeypatch.chdir(tmp_path)
    yield
    monkeypatch.delitem(__import__("sys").modules, "own_samples", raising=False)


def test_a_function_that_yields_fewer_the_second_time(generators: None) -> None:
    given = load_samples(DataRequest("own_samples:dry"), PORTS, folder=None)
    with pytest.raises(InputError, match="own_samples:dry gave 7 of 10 samples the second time") as caught:
        TrainingData(given, torch.device("cpu"))
    assert "the same samples each time" in (caught.value.hint or "")


def test_samples_of_one_shape_go_together(generators: None) -> None:
    data = TrainingData(load_samples(DataRequest("own_samples:ragged"), TOKENS, folder=None), torch.device("cpu"))
    found = list(data.batches(range(8)))
    assert [each.numbers for each in found] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [each.inputs["ids"].shape for each in found] == [(4, 3), (4, 4)]


def test_sequences_with_a_mask_are_padded_into_one_batch(generators: None) -> None:
    ports = (*TOKENS, Port("attention_mask", INT64, ("n", "length")))
    data = TrainingData(load_samples(DataRequest("own_samples:masked"), ports, folder=None), torch.device("cpu"))
    (found,) = data.batches([1, 2])
    assert found.inputs["ids"].tolist() == [[1, 1, 1, 1], [2, 2, 2, 0]]
    assert found.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_more_samples_than_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 200

    monkeypatch.setattr(data.psutil, "virtual_memory", Little)
    with pytest.raises(InputError, match="5 of 10 samples take") as caught:
        TrainingData(samples(tmp_path), torch.device("cpu"))
    assert "--samples 4" in (caught.value.hint or "")


class Mute:
    """A model without outputs of floating point."""

    def teacher(self, _: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}


def test_a_model_without_float_outputs(tmp_path: Path) -> None:
    data, options = TrainingData(samples(tmp_path), torch.device("cpu")), QatOptions()
    with pytest.raises(InputError, match="no output of floating point"):
        train(
            Mute(), data, options, Defaults(1, 1, 1.0, 1.0), seed=0, checkpoint=tmp_path / "c",  # type: ignore[arg-type]
            tick=lambda _: None, say=lambda _: None,
        )  # fmt: skip


def test_fewer_samples_evenly_spread(tmp_path: Path) -> None:
    given = samples(tmp_path, labels=range(10))
    spread = given.spread(4)
    assert [sample.label for sample in spread] == [0, 2, 5, 7] and len(given) == 10 and not spread.warnings
    assert [sample.label for sample in given.spread(99)] == list(range(10))
    fixed = samples(tmp_path, (Port("x", FLOAT, (4, 4)),), labels=range(10))
    assert len(fixed.spread(6)) == 4 and fixed.spread(6).fixed_batch == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epoch": 3}, "unknown option 'epoch'"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": 2, "steps": 5}, "epochs and steps both say how long"),
        ({"distillation": 0, "labels": 0}, "nothing would be learned"),
        ({"held_out": 0.9}, "held_out"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match="steps: qat") as caught:
        parse_steps(["gptq", {"qat": options}])
    assert says in str(caught.value)
    assert "epoch" not in options or "Did you mean 'epochs'?" in str(caught.value)


def test_qat_is_the_last_step_and_no_other_learns_scales() -> None:
    assert str(parse_steps(["gptq", "qat"])) == "gptq + qat"
    with pytest.raises(UsageError, match="qat learns scales, too"):
        parse_steps(["gptq", "tune", "qat"])
    with pytest.raises(UsageError, match="this order makes no sense"):
        parse_steps(["qat", "gptq"])
