"""`eval` of ONNX models, functions and mixtures, against naive float64 code."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from support.tiny_onnx import FLOAT, HALF, classifier, language_model, save, weights
from support.tokenizers import WORDS, save_tokenizer

import quantcli
from quantcli.cli.app import main
from quantcli.errors import InputError, UsageError
from quantcli.evaluation.tasks.embedding import Embedding
from quantcli.evaluation.tasks.fidelity import Fidelity

N = 50
USER = """
import numpy as np
import torch

def mean_logit(outputs, labels):
    assert all(each["logits"].shape == (1, 7) for each in outputs)
    return float(np.mean([each["logits"].mean() for each in outputs]))

def several(outputs, labels):
    return {"count": len(outputs), "label_sum": sum(labels), "broken": float("nan")}

def fails(outputs, labels):
    raise KeyError("oh")

def words(outputs, labels):
    return "many"

def build():
    net = torch.nn.Linear(8, 7)
    data = np.load("reference.npz")
    with torch.no_grad():
        net.weight.copy_(torch.from_numpy(data["w"].T.copy()))
        net.bias.copy_(torch.from_numpy(data["b"]))
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, x):
            return self.net(x)
    return Net()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a reference, a coarser candidate, labelled data, and a module of the user's."""
    weight, bias = weights()
    classifier(tmp_path / "model.onnx", weight, bias)
    classifier(tmp_path / "coarse.onnx", np.round(weight * 2) / 2, bias, output="scores")
    generator = np.random.default_rng(3)
    x = generator.standard_normal((N, 8)).astype(np.float32)
    labels = np.where(generator.random(N) < 0.7, (x @ weight + bias).argmax(1), generator.integers(0, 7, N))
    np.savez(tmp_path / "data.npz", x=x, labels=labels)
    np.savez(tmp_path / "bare.npz", x=x)
    np.savez(tmp_path / "reference.npz", w=weight, b=bias)
    (tmp_path / "eval_user.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "eval_user", raising=False)
    return tmp_path


def truth() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of both models in float64, and labels."""
    data = np.load("data.npz")
    weight, bias = (each.astype(np.float64) for each in weights())
    x = data["x"].astype(np.float64)
    return x @ weight + bias, x @ (np.round(weight * 2) / 2) + bias, data["labels"]


def test_classification(place: Path) -> None:
    report = quantcli.evaluate("model.onnx", ["coarse.onnx"], data="data.npz", require=["top1_drop <= 1"])
    ours, theirs, labels = truth()
    assert report.details["task"] == "classification"
    for row, logits in zip(report.models, (ours, theirs), strict=True):
        right = [
            float(max(range(7), key=lambda c: scores[c]) == label) for scores, label in zip(logits, labels, strict=True)
        ]
        ranks = [sum(score > scores[label] for score in scores) for scores, label in zip(logits, labels, strict=True)]
        share = sum(right) / N
        assert row.metrics["top1"] == pytest.approx(share)
        assert row.metrics["top1_se"] == pytest.approx(math.sqrt(share * (1 - share) / (N - 1)))
        assert row.metrics["top5"] == pytest.approx(sum(rank < 5 for rank in ranks) / N)
    agreement = sum(a.argmax() == b.argmax() for a, b in zip(ours, theirs, strict=True)) / N
    assert report.models[1].metrics["argmax_agreement"] == pytest.approx(agreement)
    assert 0.3 < agreement < 1
    assert report.gates[0].value == pytest.approx(report.models[0].metrics["top1"] - report.models[1].metrics["top1"])
    assert [row.scheme for row in report.models] == ["fp32", "fp32"]


def test_fidelity_needs_no_labels(place: Path) -> None:
    report = quantcli.evaluate("model.onnx", ["coarse.onnx"], data="bare.npz")
    ours, theirs, _ = truth()
    metrics = report.models[1].metrics
    assert report.details["task"] == "fidelity"
    assert metrics["sqnr_db"] == pytest.approx(
        10 * math.log10((ours**2).sum() / ((ours - theirs) ** 2).sum()), abs=0.01
    )
    cosines = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(ours, theirs, strict=True)]
    assert metrics["cosine"] == pytest.approx(sum(cosines) / N, abs=1e-5)
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (ours, theirs))
    assert metrics["kl_nats"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-3)
    assert metrics["argmax_agreement"] == pytest.approx((ours.argmax(1) == theirs.argmax(1)).mean())
    assert report.models[1].details["outputs"]["logits"]["sqnr_db"] == metrics["sqnr_db"]


def test_half_precision_and_torch_stand_in_one_table(place: Path) -> None:
    classifier(place / "half.onnx", *weights(), kind=HALF)
    models = ["half.onnx", "model.onnx"]
    report = quantcli.evaluate("eval_user:build", models, data="data.npz", task="fidelity")
    torch_row, half, single = report.models
    assert (torch_row.format, torch_row.scheme, torch_row.size_bytes) == ("torch", "fp32", (8 * 7 + 7) * 4)
    assert (half.format, half.scheme) == ("onnx", "fp16")
    assert 45 < half.metrics["sqnr_db"] < 80
    assert single.metrics["sqnr_db"] is None or single.metrics["sqnr_db"] > 120


def test_a_fixed_batch_is_split_into_samples(place: Path) -> None:
    classifier(place / "five.onnx", *weights(), batch=5)
    free, fixed = (quantcli.evaluate(name, data="data.npz").models[0].metrics for name in ("model.onnx", "five.onnx"))
    for name in ("top1", "top1_se", "top5"):
        assert fixed[name] == free[name]


def test_a_users_metric(place: Path) -> None:
    gate = "mean_logit_drop <= 100"
    report = quantcli.evaluate(
        "model.onnx", ["model.onnx"], data="bare.npz", task="eval_user:mean_logit", require=[gate]
    )
    ours, _, labels = truth()
    assert report.models[1].metrics["mean_logit"] == pytest.approx(ours.mean(), abs=1e-5)
    assert (report.gates[0].value, report.passed) == (0, True)
    metrics = quantcli.evaluate("model.onnx", data="data.npz", task="eval_user:several").models[0].metrics
    assert (metrics["count"], metrics["label_sum"], metrics["broken"]) == (N, labels.sum(), None)
    with pytest.raises(InputError, match=r"eval_user:fails failed on model\.onnx: KeyError"):
        quantcli.evaluate("model.onnx", data="data.npz", task="eval_user:fails")
    with pytest.raises(InputError, match="returned 'many' as words, which is not a number"):
        quantcli.evaluate("model.onnx", data="data.npz", task="eval_user:words")
    with pytest.raises(UsageError, match=r"unknown metric 'top1'.*Known: mean_logit, size_bytes, size_ratio"):
        quantcli.evaluate("model.onnx", data="data.npz", task="eval_user:mean_logit", require=["top1 > 0"])


def test_language_modeling(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    table, head = generator.standard_normal((11, 6)).astype(np.float32), generator.standard_normal((6, 11))
    language_model(tmp_path / "model.onnx", table, head.astype(np.float32))
    language_model(tmp_path / "coarse.onnx", table, np.round(head).astype(np.float32), output="other")
    ids = generator.integers(0, 11, (6, 9))
    np.savez(tmp_path / "ids.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    report = quantcli.evaluate(
        tmp_path / "model.onnx", [tmp_path / "coarse.onnx"], data=tmp_path / "ids.npz", task="language-modeling"
    )
    nll, kl, same = [], [], []
    for row in ids:
        for position in range(8):
            hidden = table[row[position]].astype(np.float64)
            p, q = (np.exp(z) / np.exp(z).sum() for z in (hidden @ head, hidden @ np.round(head)))
            nll.append(-math.log(p[row[position + 1]]))
            kl.append(float((p * np.log(p / q)).sum()))
            same.append(p.argmax() == q.argmax())
    assert report.models[0].metrics["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
    assert report.models[1].metrics["kl_nats"] == pytest.approx(np.mean(kl), rel=1e-3)
    assert report.models[1].metrics["top1_agreement"] == pytest.approx(np.mean(same))


def test_text_for_an_onnx_language_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "bert"}')
    generator = np.random.default_rng(0)
    table, head = (generator.standard_normal(shape).astype(np.float32) for shape in ((62, 6), (6, 62)))
    model = language_model(tmp_path / "model.onnx", table, head)
    indices = generator.integers(0, 60, 60)
    (tmp_path / "text.txt").write_text(" ".join(WORDS[index] for index in indices))
    report = quantcli.evaluate(model, data=tmp_path / "text.txt", seq_len=20, tokenizer=tmp_path / "tokenizer")
    assert (report.details["task"], report.details["samples"]) == ("language-modeling", 3)
    ids, nll = indices + 2, []
    for start in (0, 20, 40):
        for position in range(start, start + 19):
            logits = table[ids[position]].astype(np.float64) @ head
            nll.append(math.log(np.exp(logits).sum()) - logits[ids[position + 1]])
    assert report.models[0].metrics["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)


def test_embeddings_pool_where_there_are_tokens_and_flatten_where_not() -> None:
    hidden = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    other = hidden.copy()
    other[0, 2] = -100  # behind the mask
    feeds = {"attention_mask": np.array([[1, 1, 0]])}
    for pooling in ("mean", "cls", "last"):
        score = Embedding("M", pooling)
        score.add(feeds, None, {"last_hidden_state": other}, {"tokens": hidden})
        assert score.metrics()["cosine"] == pytest.approx(1)
    flat = Embedding("M", "mean")
    flat.add({}, None, {"y": np.array([[1.0, 0.0]], np.float32)}, {"y": np.array([[1.0, 1.0]], np.float32)})
    assert flat.metrics()["cosine_min"] == pytest.approx(math.sqrt(0.5))


def test_fidelity_reports_the_worst_output_and_reads_probabilities() -> None:
    good, bad = np.array([[0.5, 0.25, 0.25]], np.float32), np.array([[0.25, 0.5, 0.25]], np.float32)
    hidden = np.ones((1, 3), np.float32)
    score = Fidelity("M")
    score.add({}, None, {"probabilities": bad, "hidden": hidden}, {"probabilities": good, "hidden": hidden})
    metrics = score.metrics()
    assert metrics["kl_nats"] == pytest.approx(0.25 * math.log(2))
    assert metrics["argmax_agreement"] == 0
    assert metrics["sqnr_db"] == pytest.approx(10 * math.log10(0.375 / 0.125))
    assert score.details()["outputs"]["hidden"] == {
        "sqnr_db": None, "cosine": 1.0, "cosine_se": None, "not_finite": 0.0,
    }  # fmt: skip


def quantized_pair(place: Path) -> None:
    """Two layers; in the candidate both outputs are quantized on a grid of 0.25, as quantcli names them."""
    weight, bias = weights()
    second = np.random.default_rng(9).standard_normal((7, 3)).astype(np.float32)
    ports = (
        [helper.make_tensor_value_info("x", FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("out", FLOAT, ["n", 3])],
    )
    first = helper.make_node("Gemm", ["x", "w", "b"], ["hidden"], name="first")
    constants = {"w": weight, "b": bias, "v": second}
    last = helper.make_node("MatMul", ["hidden", "v"], ["out"], name="last")
    save(place / "plain.onnx", [first, last], *ports, constants)
    pair = [
        helper.make_node("QuantizeLinear", ["hidden", "scale", "zero"], ["hidden_quantized"]),
        helper.make_node("DequantizeLinear", ["hidden_quantized", "scale", "zero"], ["hidden_dequantized"]),
    ]
    after = helper.make_node("MatMul", ["hidden_dequantized", "v_rounded"], ["out"], name="last")
    grid = {"scale": np.float32(0.25), "zero": np.int8(0), "w": weight, "b": bias, "v_rounded": np.round(second)}
    save(place / "quantized.onnx", [first, *pair, after], *ports, grid)
    manifest = {"format": "onnx", "scheme": "int8", "layers": {"v": {"node": "last", "scheme": "int8"}}}
    model = onnx.load(place / "quantized.onnx")
    helper.set_model_props(model, {"quantcli": json.dumps(manifest)})
    onnx.save(model, place / "quantized.onnx")


def test_by_layer_compares_values_of_the_same_name(place: Path) -> None:
    quantized_pair(place)
    x = np.load("bare.npz")["x"][:8]
    np.savez("few.npz", x=x)
    report = quantcli.evaluate("plain.onnx", ["quantized.onnx"], data="few.npz", by_layer=True)
    weight, bias = (each.astype(np.float64) for each in weights())
    hidden = x.astype(np.float64) @ weight + bias
    second = np.random.default_rng(9).standard_normal((7, 3)).astype(np.float32).astype(np.float64)
    grid = np.round(hidden / 0.25) * 0.25

    def sqnr(ours: np.ndarray, theirs: np.ndarray) -> float:
        return 10 * math.log10((ours**2).sum() / ((ours - theirs) ** 2).sum())

    assert [(row.name, row.scheme, row.bytes_before) for row in report.layers] == [
        ("v", "int8", 84),
        ("hidden", "activation", 0),
    ]
    assert report.layers[0].sqnr_db == pytest.approx(sqnr(hidden @ second, grid @ np.round(second)), abs=0.05)
    assert report.layers[1].sqnr_db == pytest.approx(sqnr(hidden, grid), abs=0.05)
    assert report.models[1].scheme == "int8"
    assert {row.model for row in report.layers} == {"quantized.onnx"}


def test_by_layer_needs_models_of_one_kind(place: Path) -> None:
    with pytest.raises(UsageError, match="two ONNX models"):
        quantcli.evaluate("eval_user:build", ["model.onnx"], data="data.npz", by_layer=True)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["model.onnx", "--data", "bare.npz", "--task", "classification"], 3, "bare.npz has no labels"),
        (["model.onnx", "--data", "no.npz"], 3, "no.npz does not exist"),
        (["model.onnx", "--data", "wrong.npz"], 3, "x: float32"),
        (["model.onnx", "--data", "high.npz"], 3, "label 9; model.onnx has 7 classes"),
        (["model.onnx", "--data", "data.npz", "--task", "guess"], 2, "Unknown task 'guess'"),
        (["model.onnx", "--data", "data.npz", "--require", "perplexity < 3"], 2, "Known: size_bytes, size_ratio, top1"),
        (["model.onnx", "other.onnx", "--data", "bare.npz"], 3, "do not correspond to the reference's logits"),
        (["model.onnx", "narrow.onnx", "--data", "bare.npz"], 3, "the reference one of [1, 7]"),
        (["model.onnx", "--data", "bare.npz", "--task", "language-modeling"], 3, "takes no input_ids"),
        (["model.onnx", "--data", "data.npz", "--task", "no_module:here"], 3, "no module no_module"),
        (["model.onnx", "--data", "text.txt"], 3, "text.txt is text, and model.onnx takes no input_ids"),
        (["text.onnx", "--data", "text.txt"], 3, "Name one with --tokenizer FOLDER"),
        (["data.npz", "--data", "data.npz"], 3, "not a kind of model"),
    ],
)
def test_bad_input_is_explained(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, words: str
) -> None:
    weight, bias = weights()
    classifier(place / "narrow.onnx", weight[:, :3], bias[:3], output="scores")
    ports = [helper.make_tensor_value_info("x", FLOAT, ["n", 8])]
    outputs = [helper.make_tensor_value_info(name, FLOAT, ["n", 8]) for name in ("p", "q")]
    save(place / "other.onnx", [helper.make_node("Relu", ["x"], [name]) for name in ("p", "q")], ports, outputs, {})
    (place / "text.txt").write_text("Some words.")
    language_model(place / "text.onnx", np.ones((11, 6), np.float32), np.ones((6, 11), np.float32))
    np.savez(place / "wrong.npz", x=np.zeros((3, 9), np.float32))
    np.savez(place / "high.npz", x=np.zeros((3, 8), np.float32), labels=np.array([1, 9, 2]))
    assert main(["eval", *arguments]) == status
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def maps_and_sequences(path: Path, batch: object) -> Path:
    """What classifiers of scikit-learn return, and a sequence beside it."""
    generator = np.random.default_rng(1)
    constants = {
        "w": generator.standard_normal((32, 64)).astype(np.float32),
        "v": (generator.standard_normal((64, 10)) / 8).astype(np.float32),
        "halves": np.array(32),
    }
    table = helper.make_map_type_proto(onnx.TensorProto.INT64, helper.make_tensor_type_proto(FLOAT, []))
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("SplitToSequence", ["h", "halves"], ["parts"], axis=1),
            helper.make_node("MatMul", ["h", "v"], ["l"]),
            helper.make_node("Softmax", ["l"], ["p"]),
            helper.make_node("ZipMap", ["p"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=list(range(10))),
        ],
        "classes",
        [helper.make_tensor_value_info("x", FLOAT, [batch, 32])],
        [
            helper.make_value_info("maps", helper.make_sequence_type_proto(table)),
            helper.make_tensor_sequence_value_info("parts", FLOAT, None),
        ],
        [onnx.numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


@pytest.mark.parametrize("batch", ["n", 2])
def test_maps_and_sequences(tmp_path: Path, batch: object) -> None:
    model = maps_and_sequences(tmp_path / "m.onnx", batch)
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(2).standard_normal((6, 32)).astype(np.float32))
    quantcli.convert(model, tmp_path / "q.onnx", scheme="int8", allow_larger=True)
    report = quantcli.evaluate(model, [tmp_path / "q.onnx"], data=tmp_path / "d.npz", by_layer=True)
    row = report.models[1]
    assert set(row.details["outputs"]) == {"maps", "parts[0]", "parts[1]"}
    assert row.metrics["sqnr_db"] > 25 and row.details["outputs"]["maps"]["argmax_agreement"] == 1
    assert {layer.name for layer in report.layers} == {"w", "v"}
