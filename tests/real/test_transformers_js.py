"""transformers.js itself, under Node: it opens what was written and computes what onnxruntime computes of the file.

Its onnxruntime is another release than Python's, and browsers have a third one, compiled to WebAssembly, which takes
the inputs of products as they are where the others round them to int8.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support import real_models
from support import transformers_js as node
from support.decoders import saved_decoder, tiny_decoder
from support.graphs import with_accuracy_level

from quantcli.commands.convert import convert
from quantcli.core.ports import cache_ports
from quantcli.export.decoder.architecture import ARCHITECTURES
from quantcli.models.decoder import cached_decoder, empty_cache, sized_cache
from quantcli.models.hugging_face import load_tokenizer
from quantcli.models.session import Session
from quantcli.onnx.graph.model import onnx_file
from quantcli.planning.targets import transformers_js

pytestmark = pytest.mark.slow

PROMPT, COUNT = [5, 17, 60, 33, 9, 71, 44], 24
TEXTS = ["A cat sat on the mat."]


@pytest.fixture(scope="module", autouse=True)
def packages() -> Path:
    """Before anything is converted."""
    return node.packages()


def session_output(artifact: Path, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    found: np.ndarray = next(iter(Session(onnx_file(artifact)).run(dict(feeds)).values()))
    return found


def unrounded_output(artifact: Path, feeds: Mapping[str, np.ndarray], place: Path) -> np.ndarray:
    """The same, with inputs of products as they are."""
    shutil.copytree(artifact / "onnx", place)
    (file,) = place.glob("*.onnx")
    model = onnx.load(file, load_external_data=False)
    file.write_bytes(with_accuracy_level(model, 0).SerializeToString())
    return session_output(file, feeds)


def wasm(artifact: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {"kind": "wasm", "file": str(onnx_file(artifact)), "inputs": node.told(feeds)}


def sqnr_db(expected: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10(np.square(expected).sum() / max(np.square(expected - got).sum(), 1e-30)))


def test_the_tables_are_those_of_the_package(packages: Path) -> None:
    registry = (packages / "node_modules/@huggingface/transformers/src/models/registry.js").read_text()
    tables = {
        "ForSequenceClassification": "SEQUENCE_CLASSIFICATION",
        "ForTokenClassification": "TOKEN_CLASSIFICATION",
        "ForQuestionAnswering": "QUESTION_ANSWERING",
        "ForImageClassification": "IMAGE_CLASSIFICATION",
    }
    for head, types in transformers_js.HEADS.items():
        match = re.search(rf"MODEL_FOR_{tables[head]}_MAPPING_NAMES = new Map\(\[(.*?)\]\);", registry, re.DOTALL)
        assert match is not None
        assert sorted(re.findall(r"\['([^']+)'", match[1])) == sorted(types)
    match = re.search(r"MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = new Map\(\[(.*?)\]\);", registry, re.DOTALL)
    assert match is not None
    # Those that read images as well, and those that are decoders of an encoder, it keeps in several files.
    parts = {"gemma3", "mbart", "phi3_v", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "trocr"}
    known = {*transformers_js.LANGUAGE_MODELS, *ARCHITECTURES, *parts}
    assert set(re.findall(r"\['([^']+)'", match[1])) == known


def test_embeddings_of_a_real_model(tmp_path: Path) -> None:
    folder = real_models.minilm_folder(tmp_path)
    convert(folder, tmp_path / "out", scheme="int8-dynamic", target="transformers.js")
    tokens = load_tokenizer(folder)(TEXTS, return_tensors="np")
    feeds = {name: np.asarray(values, np.int64) for name, values in tokens.items()}
    expected = session_output(tmp_path / "out", feeds)
    jobs = [{"kind": "features", "folder": str(tmp_path / "out"), "texts": TEXTS}, wasm(tmp_path / "out", feeds)]
    for found in node.run(jobs, tmp_path):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_scores_of_classes(models: Path, tmp_path: Path) -> None:
    wishes: list[dict[str, str]] = [{"scheme": "int4"}, {"scheme": "int4", "rest": "fp16"}, {"scheme": "nf4"}]
    feeds = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)}
    asked = {"kind": "output", "model": "AutoModelForImageClassification", "output": "logits"}
    jobs: list[dict[str, Any]] = []
    expected = []
    for number, each in enumerate(wishes):
        out = tmp_path / str(number)
        convert(models / "vit", out, target="transformers.js", allow_larger=True, **each)  # type: ignore[arg-type]
        jobs += [{**asked, "folder": str(out), "inputs": node.told(feeds)}, wasm(out, feeds)]
        expected += [session_output(out, feeds), unrounded_output(out, feeds, tmp_path / f"exact-{number}")]
    for job, meant, found in zip(jobs, expected, node.run(jobs, tmp_path), strict=True):
        assert sqnr_db(meant, found) > 90, job["kind"]


def test_exported_decoders_say_the_same_tokens(tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {"gpt2": {}, "falcon": {"num_kv_heads": 1, "multi_query": True}}
    jobs, said = [], []
    for model_type, each in settings.items():
        out = tmp_path / f"{model_type}-out"
        folder = saved_decoder(model_type, tmp_path / model_type, **each)
        convert(folder, out, scheme="int4", target="transformers.js", allow_larger=True)
        said.append(greedy(onnx_file(out)))
        jobs.append({"kind": "tokens", "folder": str(out), "ids": PROMPT, "count": COUNT})
    assert node.run(jobs, tmp_path) == said


def test_decoders_say_the_same_tokens(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, str]]] = [
        ("llama", {"scheme": "int4"}), ("qwen3", {"scheme": "int4", "rest": "fp16"}), ("gemma3", {"scheme": "int8"}),
        ("phi3", {"scheme": "fp16"}),
    ]  # fmt: skip
    jobs: list[dict[str, Any]] = []
    said, logits = [], []
    for name, wishes in cases:
        out = tmp_path / f"{name}-out"
        convert(tiny_decoder(name, tmp_path / name), out, target="transformers.js", **wishes)  # type: ignore[arg-type]
        said.append(greedy(onnx_file(out)))
        feeds = first_feeds(onnx_file(out))
        logits.append(unrounded_output(out, feeds, tmp_path / f"{name}-exact"))
        jobs += [{"kind": "tokens", "folder": str(out), "ids": PROMPT, "count": COUNT}, wasm(out, feeds)]
    found = node.run(jobs, tmp_path)
    assert found[::2] == said
    for expected, got in zip(logits, found[1::2], strict=True):
        assert sqnr_db(expected, got) > 90


def greedy(artifact: Path) -> list[int]:
    """The prompt, and the likeliest tokens after it."""
    ids = list(PROMPT)
    decoder = cached_decoder(Session(artifact), artifact, len(ids) + COUNT)
    logits = decoder.read(np.array([ids]))
    for _ in range(COUNT):
        ids.append(int(logits[0, -1].argmax()))
        logits = decoder.read(np.array([ids[-1:]]))
    return ids


def first_feeds(artifact: Path) -> dict[str, np.ndarray]:
    """The prompt, with a cache that is empty."""
    ids = np.array([PROMPT], np.int64)
    inputs = Session(artifact).inputs
    assert cache_ports(inputs)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)} | empty_cache(sized_cache(inputs, artifact), 1)
