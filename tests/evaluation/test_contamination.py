"""Leaks: shares against sets of n-grams, and what `eval` says of them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_onnx import classifier, weights
from support.tokenizers import WORDS, save_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import quantcli
from quantcli.cli.app import main
from quantcli.data.fingerprint import fingerprint
from quantcli.evaluation import contamination


def stream(seed: int, count: int) -> list[int]:
    return [random.Random(f"{seed} {i}").randrange(5000) for i in range(count)]


def windows(ids: Sequence[int], length: int) -> np.ndarray:
    return np.array(ids[: len(ids) // length * length]).reshape(-1, length)


def true_share(evaluated: np.ndarray, calibrated: np.ndarray) -> float:
    """Of the distinct runs of 13 tokens of the one, the share that the other holds."""
    one, other = (
        {tuple(row[i : i + 13]) for row in each.tolist() for i in range(len(row) - 12)}
        for each in (evaluated, calibrated)
    )
    return len(one & other) / len(one)


def test_a_fingerprint_is_small_deterministic_and_free_of_order_and_boundaries() -> None:
    ids = stream(0, 20_000)
    found = fingerprint(windows(ids, 500))
    assert found is not None and len(json.dumps(found)) < 6000
    shuffled = windows(ids, 500)[::-1]
    assert fingerprint(shuffled) == fingerprint(torch.tensor(windows(ids, 500))) == found
    as_inputs = [{"input_ids": row[None], "attention_mask": np.ones_like(row)[None]} for row in windows(ids, 500)]
    assert fingerprint(as_inputs) == found
    assert fingerprint(windows(stream(1, 20_000), 500)) != found
    assert fingerprint([]) is None
    # A value that must not change: artifacts hold it.
    known = fingerprint([list(range(14))])
    assert known == {"kind": "tokens", "ngram": 13, "complete": True, "hashes": "u4AvvWGr1gNyXWQjLhKVpA=="}


@pytest.mark.parametrize(("length", "shift"), [(500, 0), (500, 123), (128, 0), (131, 77), (2000, 11)])
def test_the_same_text_is_found_whatever_its_windows(length: int, shift: int) -> None:
    ids = stream(0, 20_000)
    calibrated, evaluated = windows(ids, 500), windows(ids[shift:], length)
    found = fingerprint(calibrated)
    assert found
    truth = true_share(evaluated, calibrated)
    assert truth > 0.9
    assert contamination.overlap(found, evaluated) == pytest.approx(truth, abs=0.05)


@pytest.mark.parametrize("part", [0.1, 0.37, 0.8])
def test_a_part_is_estimated(part: int) -> None:
    ids = stream(0, 30_000)
    evaluated = windows([*ids[: int(20_000 * part)], *stream(2, int(20_000 * (1 - part)))], 250)
    found = fingerprint(windows(ids, 500))
    assert found
    # One standard error is at most 0.5 / sqrt(512 * 20 / 30), about 0.027.
    assert contamination.overlap(found, evaluated) == pytest.approx(true_share(evaluated, windows(ids, 500)), abs=0.08)


def test_other_text_is_not_taken_for_the_same() -> None:
    found = fingerprint(windows(stream(0, 20_000), 500))
    assert found
    assert contamination.overlap(found, windows(stream(1, 20_000), 500)) == 0
    # Runs of twelve are chance, also where all tokens of the text were seen.
    ids = stream(0, 20_000)
    pieces = [ids[12 * index : 12 * index + 12] for index in reversed(range(1600))]
    assert contamination.overlap(found, windows(list(chain.from_iterable(pieces)), 600)) == 0


def test_padding_is_no_text() -> None:
    ids = stream(0, 200)
    padded = {"input_ids": [[*ids, *[0] * 100]], "attention_mask": [[*[1] * 200, *[0] * 100]]}
    assert fingerprint([padded]) == fingerprint([ids])
    assert fingerprint([{"input_ids": padded["input_ids"]}]) != fingerprint([ids])


def test_short_texts_count_whole() -> None:
    lines = [stream(seed, 6) for seed in range(200)]
    found = fingerprint(lines)
    assert found
    assert contamination.overlap(found, lines[:50]) == 1
    assert contamination.overlap(found, [*lines[:50], *(stream(seed, 6) for seed in range(500, 550))]) == 0.5
    assert contamination.overlap(found, [line[:5] for line in lines]) == 0


def test_arrays_are_compared_sample_by_sample() -> None:
    rng = np.random.default_rng(0)
    images = [{"image": rng.standard_normal((1, 3, 4, 4)).astype(np.float32)} for _ in range(2000)]
    found = fingerprint(images[:1000])
    assert found and found["kind"] == "arrays" and not found["complete"]
    assert contamination.overlap(found, images[1000:]) == 0
    assert contamination.overlap(found, images[:300]) == 1
    assert contamination.overlap(found, images[500:1500]) == pytest.approx(0.5, abs=0.08)
    assert contamination.overlap(found, [{"pixels": images[0]["image"]}, *images[:3]]) == 1
    assert contamination.overlap(found, windows(stream(0, 500), 100)) == 0


@pytest.mark.parametrize(
    "broken",
    [{}, {"kind": "words"}, {"ngram": 5}, {"complete": None}, {"hashes": "?"}, {"hashes": 3}, {"hashes": "AAAA"}],
)
def test_a_broken_fingerprint_is_said_to_be_one(broken: dict[str, object]) -> None:
    found = fingerprint([stream(0, 100)])
    assert found
    check = contamination.LeakCheck([("model", found | broken if broken else {})])
    check.add(np.array(stream(0, 100)))
    (warning,) = check.warnings()
    assert "cannot be told" in warning and "model" in warning


def text_file(path: Path, seed: int, count: int = 6000) -> Path:
    chosen = random.Random(seed)
    path.write_text(" ".join(chosen.choice(WORDS) for _ in range(count)))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_eval_warns_of_text_that_calibration_saw(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, candidate = llama, tmp_path / "candidate"
    quantcli.convert(model, candidate, scheme="int8")
    seen, unseen = text_file(tmp_path / "seen.txt", 1), text_file(tmp_path / "unseen.txt", 2)
    # Token ids of the test's tokenizer are those of the words, after the two special ones.
    ids = [WORDS.index(word) + 2 for word in seen.read_text().split()]
    manifest = json.loads((candidate / "quantcli.json").read_text())
    manifest["calibration_fingerprint"] = fingerprint(windows(ids, 100))
    (candidate / "quantcli.json").write_text(json.dumps(manifest))

    def warnings(data: Path, *flags: str) -> list[str]:
        arguments = ["eval", str(model), str(candidate), "--data", str(data), "--json", "-q", *flags]
        assert main(arguments) == 0
        found: list[str] = json.loads(capsys.readouterr().out)["warnings"]
        return found

    assert not warnings(unseen, "--seq-len", "128")
    for flags in (("--seq-len", "100"), ("--seq-len", "128"), ("--seq-len", "77", "--samples", "9")):
        (warning,) = warnings(seen, *flags)
        assert "calibration data" in warning and str(candidate) in warning
    mixed = tmp_path / "mixed.txt"
    mixed.write_text(f"{unseen.read_text()} {seen.read_text()}")
    (warning,) = warnings(mixed, "--seq-len", "120", "--samples", "200")
    share = int(warning.split("%")[0].split()[-1])
    assert share == pytest.approx(44, abs=9)


@pytest.mark.usefixtures("no_runtime_check")
def test_a_calibrated_checkpoint_knows_its_data(llama: Path, tmp_path: Path) -> None:
    seen, unseen = text_file(tmp_path / "seen.txt", 1), text_file(tmp_path / "unseen.txt", 2)
    quantcli.convert(llama, tmp_path / "gptq", scheme="int4", algorithm="gptq", data=seen, samples=60, seq_len=100)
    quantcli.convert(llama, tmp_path / "rtn", scheme="int4", algorithm="rtn")

    def warned(data: Path) -> list[str]:
        found = quantcli.evaluate(llama, [tmp_path / "gptq", tmp_path / "rtn"], data=data, samples=8, seq_len=64)
        return [name for name in ("gptq", "rtn") if any(f"{name}: its figures" in each for each in found.warnings)]

    assert warned(seen) == ["gptq"]
    assert warned(unseen) == []


@pytest.mark.usefixtures("no_runtime_check")
def test_what_is_made_of_a_calibrated_checkpoint_keeps_its_fingerprint(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "calibrated")
    known = {"calibration": {"samples": 3}, "calibration_fingerprint": fingerprint([stream(0, 100)])}
    (tmp_path / "calibrated" / "quantcli.json").write_text(json.dumps(known))
    quantcli.convert(tmp_path / "calibrated", tmp_path / "int8", scheme="int8")
    manifest = json.loads((tmp_path / "int8" / "quantcli.json").read_text())
    assert {key: manifest[key] for key in known} == known


def test_eval_warns_of_arrays_that_calibration_saw(tmp_path: Path) -> None:
    weight, bias = weights()
    model, out = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    classifier(model, np.tile(weight, (8, 40)), np.tile(bias, 40))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, weight.shape[0] * 8)).astype(np.float32)
    for name, part in {"seen": x[:40], "unseen": x[40:], "half": x[20:]}.items():
        np.savez(tmp_path / f"{name}.npz", x=part)
    stats = tmp_path / "stats.safetensors"
    quantcli.calibrate(model, data=tmp_path / "seen.npz", output=stats, batch_size=7)
    quantcli.convert(model, out, scheme="int8-static", data=str(tmp_path / "seen.npz"))
    quantcli.convert(model, tmp_path / "two.onnx", scheme="int8-static", calibration=stats)

    def warnings(name: str) -> list[str]:
        found = quantcli.evaluate(model, [out, tmp_path / "two.onnx"], data=tmp_path / f"{name}.npz")
        return [warning for warning in found.warnings if "calibration data" in warning]

    assert not warnings("unseen")
    assert ["100%" in warning for warning in warnings("seen")] == [True, True]
    assert ["50%" in warning for warning in warnings("half")] == [True, True]
