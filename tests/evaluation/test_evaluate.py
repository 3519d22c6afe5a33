"""`eval`: metrics against naive float64 code, gates, and the report, on tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support.tokenizers import WORDS, save_tokenizer
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import quantcli
from quantcli.cli.app import main
from quantcli.errors import InputError, UsageError
from quantcli.evaluation.metrics import Divergence, Fidelity, Mean, Perplexity, cosine, kl_nats, verdict


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(1)
    path = tmp_path_factory.mktemp("data") / "text.txt"
    rows = torch.randint(0, len(WORDS), (40, 12), generator=generator).tolist()
    path.write_text("\n".join(" ".join(WORDS[index] for index in row) for row in rows))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def int4(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int4") / "out"
    quantcli.convert(llama, folder, scheme="int4", target="vllm", rest="keep")
    return folder


def test_perplexity_and_divergence_agree_with_naive_code(llama: Path, int4: Path, text: Path) -> None:
    report = quantcli.evaluate(llama, [int4], data=text, samples=5, seq_len=16)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 16 * 16]).reshape(-1, 16)
    chosen = [windows[i * len(windows) // 5] for i in range(5)]
    ours, theirs = (LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (llama, int4))
    nll, kls, agreements = [], [], []
    for window in chosen:
        with torch.no_grad():
            p = ours(window[None]).logits[0].double()
            q = theirs(window[None]).logits[0].double()
        for position in range(15):
            logp, logq = (x[position] - x[position].exp().sum().log() for x in (p, q))
            nll.append(-logp[window[position + 1]].item())
            kls.append(sum(math.exp(a) * (a - b) for a, b in zip(logp.tolist(), logq.tolist(), strict=True)))
            agreements.append(float(logp.argmax() == logq.argmax()))
    reference, candidate = (row.metrics for row in report.models)
    assert reference["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert candidate["kl_nats"] == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert candidate["top1_agreement"] == pytest.approx(sum(agreements) / len(agreements), abs=0.02)
    assert 0 < candidate["kl_nats"] < 1
    assert candidate["kl_nats_se"] > 0


def test_a_model_against_itself_is_perfect(llama: Path, text: Path) -> None:
    report = quantcli.evaluate(llama, [llama], data=text, samples=3, seq_len=16, by_layer=True)
    metrics = report.models[1].metrics
    assert metrics["kl_nats"] == 0
    assert metrics["top1_agreement"] == 1
    assert metrics["size_ratio"] == 1
    assert report.layers == []


def test_embeddings_are_pooled_over_the_mask(bert: Path, text: Path, tmp_path: Path) -> None:
    quantcli.convert(bert, tmp_path / "int8", scheme="int8", target="vllm", rest="keep")
    report = quantcli.evaluate(bert, [tmp_path / "int8"], data=text, samples=4)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    lines = text.read_text().splitlines()
    cosines = []
    for line in (lines[i * len(lines) // 4] for i in range(4)):
        vectors = []
        for path in (bert, tmp_path / "int8"):
            model = BertModel.from_pretrained(path, dtype=torch.float32).eval()
            with torch.no_grad():
                vectors.append(model(**tokenizer(line, return_tensors="pt")).last_hidden_state[0].double().mean(0))
        cosines.append(torch.nn.functional.cosine_similarity(*vectors, dim=0).item())
    assert report.details["task"] == "embedding"
    assert report.models[1].metrics["cosine"] == pytest.approx(sum(cosines) / 4, abs=1e-6)
    assert report.models[1].metrics["cosine_min"] == pytest.approx(min(cosines), abs=1e-6)


def test_by_layer_names_quantized_layers_worst_first(llama: Path, int4: Path, text: Path) -> None:
    report = quantcli.evaluate(llama, [int4], data=text, samples=3, seq_len=16, by_layer=True)
    assert len(report.layers) == 14
    figures = [row.sqnr_db for row in report.layers]
    assert figures == sorted(figures)
    assert all(row.scheme and row.bytes_after < row.bytes_before for row in report.layers)
    first = next(row for row in report.layers if row.name == "model.layers.0.self_attn.q_proj")
    # The first layer's input is exact, so its output has about the weight's own error: 4 bits are near 20 dB.
    assert 14 < first.sqnr_db < 26


def test_fidelity_compares_every_output(llama: Path, int4: Path, text: Path) -> None:
    metrics = quantcli.evaluate(llama, [int4], data=text, samples=3, seq_len=16, task="fidelity").models[1].metrics
    assert 3 < metrics["sqnr_db"] < 40
    assert 0.8 < metrics["cosine"] < 1
    assert set(metrics) >= {"kl_nats", "argmax_agreement"}


def test_gates_decide_the_exit_status(
    llama: Path, int4: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["eval", str(llama), str(int4), "--data", str(text), "--samples", "3", "--seq-len", "16", "--json"]
    assert main([*base, "--require", "kl_nats < 5", "--require", "size_ratio<=1"]) == 0
    capsys.readouterr()
    junit, markdown = tmp_path / "gates.xml", tmp_path / "report.md"
    gate = ["--require", "perplexity_drop >= 1000", "--junit", str(junit), "--markdown", str(markdown)]
    assert main([*base, *gate]) == 1
    document = json.loads(capsys.readouterr().out)
    (row,) = document["gates"]
    drop = document["models"][0]["metrics"]["perplexity"] - document["models"][1]["metrics"]["perplexity"]
    assert row == {"require": "perplexity_drop >= 1000", "model": str(int4), "value": drop, "passed": False}
    assert "<failure" in junit.read_text()
    assert "| perplexity_drop >= 1000 |" in markdown.read_text()


#: Mean KL divergence of llama.cpp's formats of Llama-3-8B, as its "LLaMA 3 8b Scoreboard" has them.
PUBLISHED = {"q8_0": 0.001355, "q6_K": 0.005452, "q4_K_M": 0.031273, "q4_0": 0.071940}


def test_a_verdict_is_that_of_the_published_format_in_its_band() -> None:
    for name, kl in PUBLISHED.items():
        assert verdict(kl).lower().endswith(f"like {name}".lower())
    edges = {
        "no visible loss": (0.0, 0.002), "very small loss": (0.00201, 0.01), "small loss": (0.0101, 0.04),
        "noticeable loss": (0.0401, 0.1), "large loss": (0.1001, 50.0, math.inf, math.nan),
    }  # fmt: skip
    assert {word: [verdict(kl).startswith(word) for kl in ends] for word, ends in edges.items()} == {
        word: [True] * len(ends) for word, ends in edges.items()
    }


def test_candidates_get_a_verdict_in_every_report(
    llama: Path, int4: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["eval", str(llama), str(int4), str(llama), "--data", str(text), "--samples", "3", "--seq-len", "16"]
    assert main([*base, "--json", "--markdown", str(tmp_path / "report.md")]) == 0
    reference, candidate, same = json.loads(capsys.readouterr().out)["models"]
    assert "verdict" not in reference
    assert candidate["verdict"] == verdict(candidate["metrics"]["kl_nats"]) != "no visible loss, like Q8_0"
    assert same["verdict"] == "no visible loss, like Q8_0"
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.endswith("like Q8_0 |")]
    assert len(rows) == 1 and rows[0].count("|") == 3
    assert main([*base, "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert candidate["verdict"] in shown and "measured on Llama-3-8B" in " ".join(shown.split())
    assert main([*base, "--task", "fidelity", "--json"]) == 0
    assert not any("verdict" in model for model in json.loads(capsys.readouterr().out)["models"])


@pytest.mark.parametrize("expression", ["kl_nats", "kl_nats => 3", "banana < 1", "top5 < 1", "kl_nats < 1.2.3"])
def test_a_gate_that_cannot_be_meant_is_a_usage_error(llama: Path, int4: Path, text: Path, expression: str) -> None:
    with pytest.raises(UsageError):
        quantcli.evaluate(llama, [int4], data=text, require=[expression])


def test_wrong_data_is_refused(llama: Path, tmp_path: Path) -> None:
    short, empty, odd = tmp_path / "short.txt", tmp_path / "empty.jsonl", tmp_path / "odd.csv"
    for path, content in ((short, "w1 w2"), (empty, "\n"), (odd, "a,b")):
        path.write_text(content)
    for path, words in (
        (short, "2 tokens"),
        (empty, "no text"),
        (odd, "no known kind"),
        (tmp_path / "no.txt", "cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            quantcli.evaluate(llama, data=path)


def test_jsonl_fields(tmp_path: Path) -> None:
    from quantcli.data.text_files import load_labelled_texts

    path = tmp_path / "data.jsonl"
    path.write_text('{"id": 1, "text": "one"}\n\n"two"\n{"sentence": "three", "other": "x"}\n')
    assert load_labelled_texts(path, lines=False)[0] == ["one", "two", "three"]
    path.write_text('{"a": "x", "b": "y"}\n')
    with pytest.raises(InputError, match="it has a, b"):
        load_labelled_texts(path, lines=False)
    path.write_text("{oops\n")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        load_labelled_texts(path, lines=False)


def test_parquet_text(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    from quantcli.data.text_files import load_labelled_texts

    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), path)
    assert load_labelled_texts(path, lines=False)[0] == ["one", "two"]
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="not a readable parquet"):
        load_labelled_texts(path, lines=False)


def test_a_base_model_has_no_head_to_score_with(bert: Path, text: Path) -> None:
    with pytest.raises(InputError, match=r"would be random|cannot load"):
        quantcli.evaluate(bert, data=text, task="language-modeling", seq_len=16)


def test_metrics_of_known_values() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]))
    perplexity = Perplexity()
    perplexity.add(logits, torch.tensor([0, 1]))
    assert perplexity.metrics() == {"perplexity": pytest.approx(4.0), "perplexity_se": None}
    uniform = torch.zeros(2, 3)
    expected = math.log(3) - 1.5 * math.log(2)
    assert kl_nats(logits, uniform).tolist() == pytest.approx([expected, expected])
    divergence = Divergence()
    divergence.add(logits, logits.flip(0))
    assert divergence.metrics("agreement")["agreement"] == 0
    fidelity = Fidelity()
    fidelity.add(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
    assert fidelity.sqnr_db == pytest.approx(20.0)
    assert cosine(torch.tensor([1.0, 0.0]).double(), torch.tensor([1.0, 1.0]).double()) == pytest.approx(math.sqrt(0.5))
    mean = Mean()
    for value in (1.0, 2.0, 3.0):
        mean.add(value)
    assert (mean.mean, mean.standard_error) == (2.0, pytest.approx(1 / math.sqrt(3)))
