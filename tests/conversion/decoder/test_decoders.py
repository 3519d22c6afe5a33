"""Tiny random decoders of every architecture: from the cache as from the whole text, and token for token as torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support.decoders import TINY, greedy_in_genai, greedy_in_torch, tiny_decoder, torch_with_codes, without_rounding
from torch import nn

import quantcli
from quantcli.benchmarking.generation import NEW_TOKENS
from quantcli.benchmarking.probe import Probe, load_and_run
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.decoded import decoded_checkpoint
from quantcli.errors import InputError, UsageError
from quantcli.export.decoder.graph import HEAD_PARTS
from quantcli.export.decoder.rotary import rotary_tables
from quantcli.models.runner import OnnxRunner
from quantcli.planning.recipe import Recipe

PROMPT = [5, 17, 60, 33, 9, 71, 44]
COUNT = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Converts a tiny model, each once: its folder, the artifact and the report."""
    cache: dict[tuple[str, str], tuple[Path, Path, Any]] = {}

    def make(name: str, scheme: str = "int8") -> tuple[Path, Path, Any]:
        if (name, scheme) not in cache:
            place = tmp_path_factory.mktemp(f"{name}-{scheme}")
            folder = tiny_decoder(name, place / "model")
            report = quantcli.convert(folder, place / "out", scheme=scheme, target="onnxruntime-genai")
            cache[name, scheme] = folder, place / "out", report
        return cache[name, scheme]

    return make


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_torch_and_of_the_cache(made: Any, name: str) -> None:
    _, _, report = made(name)
    proof = report.details["verified"]["decoder"]
    assert proof["torch"]["compared"]
    assert proof["torch"]["sqnr_db"] is None or proof["torch"]["sqnr_db"] > 90
    assert proof["cache_sqnr_db"] is None or proof["cache_sqnr_db"] > 90


@pytest.mark.parametrize("name", TINY)
def test_genai_says_what_torch_says_on_the_same_codes(made: Any, name: str, tmp_path: Path) -> None:
    folder, artifact, _ = made(name)
    said = greedy_in_genai(without_rounding(artifact, tmp_path / "exact"), PROMPT, COUNT)
    assert said == greedy_in_torch(torch_with_codes(folder, artifact), PROMPT, COUNT, banned=[2])
    assert len(np.unique(said)) > 1


@pytest.mark.parametrize("name", ["linear", "llama3", "longrope", "yarn"])
def test_beyond_the_length_it_was_trained_on_a_stretched_rotary_embedding_is_torchs(
    made: Any, name: str, tmp_path: Path
) -> None:
    folder, artifact, _ = made(name)
    assert json.loads((artifact / "genai_config.json").read_text())["model"]["context_length"] == 128
    exact = OnnxRunner(without_rounding(artifact, tmp_path / "exact") / "model.onnx")
    ids = np.random.default_rng(0).integers(3, 96, (1, 128))
    with torch.inference_mode():
        expected = torch_with_codes(folder, artifact)(torch.from_numpy(ids)).logits[0].numpy()
    logits = exact.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
    for start, end in ((0, 32), (32, 33), (33, 128)):
        assert np.abs(logits[0, start:end] - expected[start:end]).max() < 1e-4


@pytest.mark.parametrize("length", [31, 32, 33, 80])
def test_longrope_turns_a_text_by_its_length(made: Any, length: int, tmp_path: Path) -> None:
    """In a batch as well, whose shorter row is padded on the right."""
    folder, artifact, report = made("longrope")
    exact = OnnxRunner(without_rounding(artifact, tmp_path / "exact") / "model.onnx")
    ids = np.random.default_rng(length).integers(3, 96, (2, length))
    mask = np.ones_like(ids)
    mask[1, length - 5 :] = 0
    with torch.inference_mode():
        expected = torch_with_codes(folder, artifact)(torch.from_numpy(ids)).logits.numpy()
    logits = exact.run({"input_ids": ids, "attention_mask": mask})["logits"]
    assert np.abs(logits[0] - expected[0]).max() < 1e-4
    assert np.abs(logits[1, : length - 5] - expected[1, : length - 5]).max() < 1e-4
    assert any("Texts of more than 32 tokens" in each for each in report.warnings)


@pytest.mark.slow
def test_genai_reads_a_text_anew_that_grows_beyond_the_short_factors(tmp_path: Path) -> None:
    rope = TINY["longrope"][1]["rope_parameters"] | {"original_max_position_embeddings": 4096}
    folder = tiny_decoder(
        "longrope", tmp_path / "model", num_hidden_layers=1, max_position_embeddings=8192, rope_parameters=rope,
        original_max_position_embeddings=4096,
    )  # fmt: skip
    report = quantcli.convert(folder, tmp_path / "out", scheme="int8", target="onnxruntime-genai")
    assert not any("Texts of more than" in each for each in report.warnings)
    prompt = np.random.default_rng(0).integers(3, 96, 4095).tolist()
    exact, model = without_rounding(tmp_path / "out", tmp_path / "exact"), torch_with_codes(folder, tmp_path / "out")
    model.set_attn_implementation("sdpa")  # In eager mode a matrix of 4096 x 4096 for each head takes seconds.
    assert greedy_in_genai(exact, prompt, 4) == greedy_in_torch(model, prompt, 4, banned=[2])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prompt_that_is_read_in_pieces_is_the_same_prompt(made: Any, name: str, tmp_path: Path) -> None:
    """Logits of a whole prompt at once would be several times the model, so that the runtime is told to take less."""
    folder, artifact, _ = made(name)
    assert json.loads((artifact / "genai_config.json").read_text())["search"]["chunk_size"] == 64
    prompt = [3 + number * 7 % 50 for number in range(90)]
    said = greedy_in_genai(without_rounding(artifact, tmp_path / "exact"), prompt, COUNT)
    assert said == greedy_in_torch(torch_with_codes(folder, artifact), prompt, COUNT, banned=[2])


def test_bench_reads_a_prompt_and_generates(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, artifact, _ = made("llama")
    # Processes that measure memory take seconds each.
    monkeypatch.setattr("quantcli.benchmarking.probe.probe", lambda *_, **__: Probe(1.0, 2, 1))
    report = quantcli.bench(folder, [artifact], seq_len=16, runs=2)
    reference, candidate = (model.metrics for model in report.models)
    for metrics in (reference, candidate):
        assert all(
            (metrics[name] or 0) > 0 for name in ("prompt_tokens_per_s", "time_to_first_token_ms", "tokens_per_s")
        )
    assert (candidate["generation_speedup"] or 0) > 0 and "generation_speedup" not in reference


@pytest.mark.parametrize("name", ["llama", "llama3"])
def test_a_large_head_is_several_products_of_the_same_codes(
    made: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole, _ = made(name)
    monkeypatch.setattr("quantcli.export.decoder.graph.LARGE_HEAD_BYTES", 0)
    quantcli.convert(folder, tmp_path / "out", scheme="int8", target="onnxruntime-genai")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    (joined,) = (node for node in graph.node if "logits" in node.output)
    assert joined.op_type == "Concat" and len(joined.input) == HEAD_PARTS > 1
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size == (whole / "model.onnx.data").stat().st_size
    ids = np.array([PROMPT], np.int64)
    ours, theirs = (OnnxRunner(each).run({"input_ids": ids})["logits"] for each in (tmp_path / "out", whole))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_a_head_are_filled_up_to_whole_blocks(tmp_path: Path, tied: bool) -> None:
    """240 columns are two blocks of 128 less 16: no longer ones than of 16 divide them."""
    folder = tiny_decoder("llama", tmp_path / "model", hidden_size=240, tie_word_embeddings=tied, head_dim=16)
    quantcli.convert(folder, tmp_path / "out", scheme="int4", group_size=16, target="onnxruntime-genai")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    (head,) = (node for node in graph.node if "logits" in node.output)
    told = {attribute.name: attribute.i for attribute in head.attribute}
    assert (told["K"], told["block_size"], told["bits"]) == (240, 128, 8)
    (codes,) = (each for each in graph.initializer if each.name == head.input[1])
    assert tuple(codes.dims) == (96, 2, 128)
    said = greedy_in_genai(without_rounding(tmp_path / "out", tmp_path / "exact"), PROMPT, COUNT)
    assert said == greedy_in_torch(torch_with_codes(folder, tmp_path / "out"), PROMPT, COUNT, banned=[2])
    assert len(np.unique(said)) > 1


def test_memory_is_measured_while_a_decoder_generates(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, artifact, _ = made("llama")
    np.savez(tmp_path / "feeds.npz", input_ids=np.array([PROMPT], np.int64))
    read = list[int]()
    monkeypatch.setattr(
        "quantcli.models.decoder.CachedDecoder.read",
        lambda self, ids: read.append(ids.shape[1]) or np.zeros((1, ids.shape[1], 96), np.float32),
    )
    request = {"model": str(artifact), "kind": "onnx", "threads": 1, "weights": None, "custom_ops": []}
    load_and_run(request | {"feeds": str(tmp_path / "feeds.npz"), "generates": True})
    assert read == [len(PROMPT), *[1] * NEW_TOKENS]


def test_eval_scores_a_decoder_as_torch_scores_its_codes(made: Any, tmp_path: Path) -> None:
    folder, artifact, _ = made("qwen3")
    exact = without_rounding(artifact, tmp_path / "exact")
    torch_with_codes(folder, artifact).save_pretrained(tmp_path / "decoded")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 53}" for i in range(900)) + "\n")
    report = quantcli.evaluate(tmp_path / "decoded", [exact], data=text, seq_len=32, samples=8, tokenizer=folder)
    ours, theirs = (model.metrics["perplexity"] for model in report.models)
    assert ours is not None and theirs == pytest.approx(ours, rel=1e-4)


def test_codes_of_a_quantized_checkpoint_are_carried_over(made: Any, tmp_path: Path) -> None:
    folder, _, _ = made("mistral")
    quantcli.convert(folder, tmp_path / "packed", scheme="int4", group_size=16, verify="codes")
    report = quantcli.convert(tmp_path / "packed", tmp_path / "out", target="onnxruntime-genai")
    assert report.details["verified"]["decoder"]["torch"]["compared"]
    ours = torch_with_codes(folder, tmp_path / "out").state_dict()
    theirs = decoded_checkpoint(open_checkpoint(tmp_path / "packed"))
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.down_proj.weight"):
        assert torch.equal(ours[name], theirs.load(name))


ASYMMETRIC = {"weights": {"dtype": "int4", "granularity": "group", "group_size": 16, "symmetric": False}}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("gemma3", {"scheme": "fp16"}),
        ("phi3", {"scheme": ASYMMETRIC, "rules": [{"match": "*.self_attn.*", "scheme": "int8", "group_size": 32}]}),
        ("llama3", {"scheme": "int4", "skip": ["lm_head", "model.layers.1.self_attn.q_proj"]}),
        ("llama", {"scheme": "int4", "rules": [{"match": "model.embed_tokens", "scheme": "int4"}]}),
    ],
    ids=["fp16", "asymmetric", "skipped", "four-bit-head"],
)
def test_schemes_and_rules_reach_the_graph(made: Any, tmp_path: Path, name: str, recipe: dict[str, Any]) -> None:
    folder, _, _ = made(name)
    wishes = Recipe(**recipe, format="onnx")
    report = quantcli.convert(folder, tmp_path / "out", recipe=wishes)
    assert report.details["verified"]["decoder"]["torch"]["compared"]
    assert not report.warnings or "cache" not in " ".join(report.warnings)


def test_a_scheme_that_a_decoder_has_no_operator_for_is_refused_by_name(made: Any, tmp_path: Path) -> None:
    folder, _, _ = made("llama")
    with pytest.raises(UsageError, match="nf4"):
        quantcli.convert(folder, tmp_path / "out", scheme="nf4", target="onnxruntime-genai")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic, which turns positions by other angles at every length"),
    ],
)  # fmt: skip
def test_a_rotary_embedding_that_no_table_holds_is_refused_before_any_work(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], reason: str
) -> None:
    folder, _, _ = made("llama")
    other = tmp_path / "model"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_theta": 1e4, **settings}}))
    rounded: list[str] = []
    monkeypatch.setattr("quantcli.algorithms.rtn.run", lambda *_: rounded.append("again"))
    with pytest.raises(InputError, match=reason):
        quantcli.convert(other, tmp_path / "out", scheme="int8", target="onnxruntime-genai")
    assert not rounded
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_interrupted_conversion_is_continued(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, artifact, _ = made("llama")
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("quantcli.export.decoder.graph._Builder.graph", lambda *_: _interrupt())
        with pytest.raises(KeyboardInterrupt):
            quantcli.convert(folder, out, scheme="int8", target="onnxruntime-genai")
    assert not out.exists()
    rounded: list[str] = []
    monkeypatch.setattr("quantcli.algorithms.rtn.run", lambda *_: rounded.append("again"))
    quantcli.convert(folder, out, scheme="int8", target="onnxruntime-genai")
    assert not rounded
    assert (out / "model.onnx.data").read_bytes() == (artifact / "model.onnx.data").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_a_decoder_that_forgets_is_found_out(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, _ = made("llama")
    monkeypatch.setattr("quantcli.export.decoder.graph.rotary_tables", _turned_twice)
    with pytest.raises(InputError, match="does not compute what torch computes"):
        quantcli.convert(folder, tmp_path / "out", scheme="int8", target="onnxruntime-genai")
    assert not (tmp_path / "out").exists()


def _turned_twice(rotary: nn.Module, kind: str | None, positions: int) -> tuple[np.ndarray, np.ndarray]:
    cosines, sines = rotary_tables(rotary, kind, 2 * positions)
    return cosines[::2], sines[::2]
