"""Layers whose weight is stored the other way round (GPT-2's Conv1D), calibrated: nf4 holds them, from data as well."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from support import oracles
from support.plain_blocks import network, recorded, token_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantcli import convert
from quantcli.algorithms import rtn
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.decoded import DecodedCheckpoint
from quantcli.checkpoint.quantized import open_quantized
from quantcli.core.scheme import Granularity, NumberFormat
from quantcli.core.tensors import TensorInfo
from quantcli.planning.plan import LayerPlan

pytestmark = pytest.mark.usefixtures("no_runtime_check")

#: As the default nf4 is laid out, by rows.
NF4 = NumberFormat("nf4", Granularity("group", 64))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 whose blocks change much, square weights among its transposed ones."""
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.15)
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    tf.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_file(tmp_path_factory.mktemp("data") / "ids.npz")


def decoded(folder: Path) -> dict[str, Tensor]:
    values = DecodedCheckpoint(open_quantized(open_checkpoint(folder)))
    return {info.name: values.load(info.name).float() for info in values.infos()}


def logits(model: nn.Module, data: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.from_numpy(np.load(data)["input_ids"])).logits
    return found


def with_weights(source: Path, weights: dict[str, Tensor]) -> nn.Module:
    model = network(source)
    model.load_state_dict(weights, strict=False)
    return model


def test_equals_a_naive_gptq_of_the_transposed_weights(gpt2: Path, data: Path, tmp_path: Path) -> None:
    convert(gpt2, tmp_path / "out", scheme="nf4", algorithm="gptq", data=data, rest="keep")
    artifact, model = decoded(tmp_path / "out"), network(gpt2)
    compared = 0
    for number, block in enumerate(model.get_submodule("transformer.h").children()):
        layers = {name: each for name, each in block.named_modules() if isinstance(each, Conv1D)}
        seen = {}
        for name, layer in layers.items():
            with recorded([layer]) as calls:
                logits(model, data)
            tokens = torch.cat([args[0].reshape(-1, len(layer.weight)) for args, _, _ in calls]).double()
            seen[name] = tokens.T @ tokens
        for name, layer in layers.items():
            matrix = layer.weight.detach().T.contiguous()
            grid = rtn.run(matrix, NF4, torch.float32)
            expected = oracles.gptq(matrix, seen[name], grid, 0.01)
            found = artifact[f"transformer.h.{number}.{name}.weight"].T.double().numpy()
            step = grid.scale.repeat_interleave(64, 1).double().numpy()
            # The nearest codes are 0.08 of a scale apart; one that lies between two may tip.
            assert np.mean(np.abs(found - expected) > 0.03 * step) < 0.01, name
            compared += 1
        for name, parameter in block.named_parameters():
            parameter.data = artifact[f"transformer.h.{number}.{name}"]
    assert compared == 8


@pytest.mark.parametrize(("algorithm", "scheme"), [("gptq", "nf4"), ("awq", "nf4"), ("gptq", "nf4-double")])
def test_outputs_are_nearer_than_those_of_rounding(
    gpt2: Path, data: Path, tmp_path: Path, algorithm: str, scheme: str
) -> None:
    convert(gpt2, tmp_path / "plain", scheme=scheme, rest="keep")
    convert(gpt2, tmp_path / "out", scheme=scheme, algorithm=algorithm, data=data, rest="keep")
    layers = json.loads((tmp_path / "out" / "quantcli.json").read_text())["layers"]
    assert [each["algorithm"] for each in layers.values() if each.get("algorithm")] == [algorithm] * 8
    expected = logits(network(gpt2), data)
    distances = [
        float((logits(with_weights(gpt2, decoded(tmp_path / name)), data) - expected).norm())
        for name in ("out", "plain")
    ]
    assert distances[0] < (0.8 if algorithm == "gptq" else 0.95) * distances[1]


def test_data_alone_means_gptq(gpt2: Path, data: Path, tmp_path: Path) -> None:
    report = convert(gpt2, tmp_path / "out", scheme="nf4", data=data, dry_run=True)
    assert report.models[-1].details["algorithm"] == "gptq"


@pytest.mark.parametrize("role", ["conv1d", "linear"])
def test_a_matrix_has_outputs_first_whichever_way_a_weight_is_stored(role: str) -> None:
    stored = torch.arange(6.0).reshape(2, 3)
    layer = LayerPlan(TensorInfo("w", (2, 3), "F32", 24, Path("model.safetensors")), role, "F32")
    matrix = layer.as_matrix(stored)
    assert matrix.tolist() == (stored.T if role == "conv1d" else stored).tolist()
    assert layer.as_weight(matrix).tolist() == stored.tolist()
