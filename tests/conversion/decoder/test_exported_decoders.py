"""Decoders of architectures that no graph is built for: exported by torch, with a cache in standard operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper
from support.decoders import (
    configured_decoder,
    decoded_matrix,
    greedy_in_genai,
    greedy_in_torch,
    saved_decoder,
    without_rounding,
)

import quantcli
from quantcli.benchmarking.generation import NEW_TOKENS, generating
from quantcli.commands.convert_decoder import Way, way_to_onnx
from quantcli.errors import InputError
from quantcli.export.cache_shape import read_cache_shape, why_no_cache
from quantcli.models.decoder import GrowingDecoder
from quantcli.models.runner import OnnxRunner
from quantcli.planning.recipe import Recipe

PROMPT, COUNT = [5, 17, 60, 33, 9, 71, 44], 16


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("mamba", {}, "mamba remembers a state of its own kind"),
        ("rwkv", {}, "rwkv remembers a state of its own kind"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "lfm2 remembers a state of its own kind"),
        ("mixtral", {"num_local_experts": 4}, "mixtral is a mixture of experts"),
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "mpt with a cache for one length"),
        (
            "stablelm",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "of stablelm is dynamic",
        ),
        ("falcon", {"alibi": True, "new_decoder_architecture": False}, "falcon with alibi multiplies in bfloat16"),
        ("gemma3_text", {"use_bidirectional_attention": True, "head_dim": 16}, "attends to what follows as well"),
    ],
)
def test_what_has_no_cache_of_keys_and_values_is_refused_by_name(
    tmp_path: Path, model_type: str, settings: dict[str, Any], reason: str
) -> None:
    folder = configured_decoder(model_type, tmp_path / "model", **settings)
    lacking = why_no_cache(folder)
    assert lacking is not None and reason in lacking.reason
    with pytest.raises(InputError, match=reason) as caught:
        quantcli.convert(folder, tmp_path / "out", scheme="int4", target="onnxruntime-genai", dry_run=True)
    assert ("-o FILE.onnx" in str(caught.value)) == lacking.exports
    assert lacking.exports == (model_type in ("mpt", "gemma3_text", "mixtral"))


def test_a_cache_is_told_without_weights(tmp_path: Path) -> None:
    folder = configured_decoder("cohere2", tmp_path / "model", layer_types=["sliding_attention", "full_attention"])
    assert why_no_cache(folder) is None
    assert read_cache_shape(folder).uniform == (2, 16)


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"head_dim": 24},
    ],
    ids=["activation", "turned", "head"],
)
@pytest.mark.parametrize("target", [None, "onnxruntime-genai", "transformers.js"])
def test_a_setting_without_a_fused_operator_is_left_to_torch(
    tmp_path: Path, target: str | None, settings: dict[str, Any]
) -> None:
    folder = configured_decoder("llama", tmp_path / "model", **settings)
    recipe = Recipe(scheme="int8", format="onnx" if target is None else None, target=target)
    assert way_to_onnx(folder, tmp_path / "out", recipe, None, None) is Way.EXPORTED
    usual = configured_decoder("llama", tmp_path / "usual")
    assert way_to_onnx(usual, tmp_path / "out", recipe, None, None) is Way.BUILT


def torch_with_codes(folder: Path, artifact: Path) -> Any:
    """The model in torch, its products' weights decoded from the artifact by the operators' documents."""
    graph = onnx.load(artifact / "model.onnx").graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state, replaced = dict(model.state_dict()), 0
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        codes, scales, *points = (constants[name] for name in node.input[1:] if name)
        bits = next(attribute.i for attribute in node.attribute if attribute.name == "bits")
        matrix = decoded_matrix(codes.reshape(len(codes), -1), scales, points, bits)
        state[f"{node.name.rpartition('/')[0]}.weight"].copy_(torch.from_numpy(matrix))
        replaced += 1
    assert replaced
    return model.eval()


@pytest.mark.slow
def test_genai_says_what_torch_says_on_the_same_codes(tmp_path: Path) -> None:
    folder = saved_decoder("stablelm", tmp_path / "model")
    report = quantcli.convert(
        folder, tmp_path / "out", scheme="int4", group_size=32, target="onnxruntime-genai", skip=["*embed_tokens*"],
        allow_larger=True,
    )  # fmt: skip
    proof = report.details["verified"]["decoder"]
    assert proof["torch"]["compared"] and proof["torch"]["sqnr_db"] > 90
    assert proof["cache_sqnr_db"] is None or proof["cache_sqnr_db"] > 90
    head = next(node for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node if "logits" in node.output)
    assert next(attribute.i for attribute in head.attribute if attribute.name == "bits") == 8
    said = greedy_in_genai(without_rounding(tmp_path / "out", tmp_path / "exact"), PROMPT, COUNT)
    assert said == greedy_in_torch(torch_with_codes(folder, tmp_path / "out"), PROMPT, COUNT, banned=[2])
    assert len(set(said)) > 1
    model = generating(OnnxRunner(tmp_path / "out"), np.array([PROMPT], np.int64))
    assert model is not None and isinstance(model.decoder, GrowingDecoder)
    model.read(0)
    model.generate(0)
    assert model.decoder.length == len(PROMPT) + NEW_TOKENS
