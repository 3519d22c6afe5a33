"""Checkpoints whose inputs are quantized too: what is observed, written, and computed by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.artifacts import config_of, decoded, loaded, tensors_of
from support.plain_blocks import network, token_file
from torch import Tensor, nn

from quantcli import convert
from quantcli.errors import UsageError

pytestmark = pytest.mark.usefixtures("no_runtime_check")


def ids_of(data: Path) -> Tensor:
    with np.load(data) as arrays:
        return torch.from_numpy(arrays["input_ids"])


def largest_inputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Largest magnitude of the inputs of every linear layer."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> object:
        def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = torch.maximum(found.get(name, torch.zeros(())), args[0].abs().amax())

        return take

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def test_fixed_scales_are_those_of_the_largest_inputs(models: Path, tmp_path: Path) -> None:
    data = token_file(tmp_path / "ids.npz")
    convert(models / "llama", tmp_path / "out", scheme="int8-static", algorithm="rtn", data=data, rest="keep")
    tensors = tensors_of(tmp_path / "out")
    section = config_of(tmp_path / "out")["quantization_config"]
    (group,) = section["config_groups"].values()
    wanted = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False}
    assert group["input_activations"] == wanted and section["format"] == "int-quantized"
    # The first block's inputs are the model's own; later ones read what quantized blocks return.
    exact = largest_inputs(network(models / "llama"), ids_of(data))
    scales = {name: values for name, values in tensors.items() if name.endswith(".input_scale")}
    assert len(scales) == 14 and all(
        values.shape == (1,) and values.dtype == torch.float32 for values in scales.values()
    )
    for name, values in scales.items():
        expected = exact[name.removesuffix(".input_scale")] / 127.5
        tolerance = 1e-5 if ".layers.0." in name else 0.05
        torch.testing.assert_close(values[0], expected, rtol=tolerance, atol=0)


def test_transformers_computes_what_codes_and_scales_say(models: Path, tmp_path: Path) -> None:
    data = token_file(tmp_path / "ids.npz")
    convert(models / "llama", tmp_path / "out", scheme="int8-static", data=data, rest="keep")
    tensors, ids = tensors_of(tmp_path / "out"), ids_of(data)
    plain = network(models / "llama")
    plain.load_state_dict(decoded(tmp_path / "out"), strict=False)

    def rounded(scale: Tensor) -> object:
        return lambda _, args: ((args[0] / scale).round().clamp(-128, 127) * scale,)

    for name, scale in tensors.items():
        if name.endswith(".input_scale"):
            module = plain.get_submodule(name.removesuffix(".input_scale"))
            module.register_forward_pre_hook(rounded(scale))
    with torch.no_grad():
        wanted, got = plain(ids).logits, loaded(tmp_path / "out", "llama")(ids).logits
        original = network(models / "llama")(ids).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.02 * float(wanted.std()))
    error = float((got - original).norm() / original.norm())
    assert 0 < error < 0.05


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static"])
def test_smoothquant_keeps_a_model_with_outliers(models: Path, tmp_path: Path, scheme: str) -> None:
    model = network(models / "llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter[3::32] *= 40
    model.save_pretrained(tmp_path / "outliers")
    data = token_file(tmp_path / "ids.npz")
    ids = ids_of(data)
    errors = {}
    for algorithm in ("rtn", "smoothquant"):
        given = None if (algorithm, scheme) == ("rtn", "int8-dynamic") else data
        convert(tmp_path / "outliers", tmp_path / algorithm, scheme=scheme, algorithm=algorithm, data=given)
        with torch.no_grad():
            wanted, found = model(ids).logits, loaded(tmp_path / algorithm, "llama")(ids).logits
        errors[algorithm] = float((found - wanted).square().mean())
    assert errors["smoothquant"] < 0.5 * errors["rtn"]


def test_layers_outside_the_blocks_stay_as_they_are(models: Path, tmp_path: Path) -> None:
    data = token_file(tmp_path / "ids.npz")
    report = convert(models / "bert", tmp_path / "out", scheme="int8-static", data=data)
    reasons = {row.name: row.reason or "" for row in report.layers}
    assert "range of inputs is not observed" in reasons["pooler.dense.weight"]
    assert tensors_of(tmp_path / "out")["pooler.dense.weight"].dtype == torch.bfloat16


def test_fixed_ranges_need_data(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8-static needs calibration data"):
        convert(models / "llama", tmp_path / "out", scheme="int8-static")
    assert not list(tmp_path.iterdir())


def test_the_manifest_says_where_the_same_bytes_come_out(models: Path, tmp_path: Path) -> None:
    data = token_file(tmp_path / "ids.npz")

    def found(**options: Any) -> Any:
        convert(models / "llama", tmp_path / "out", force=True, **options)
        return json.loads((tmp_path / "out" / "quantcli.json").read_text()).get("reproducible")

    here = "on the same processor with as many threads"
    assert found(scheme="bf16") is None
    assert found(scheme="int4", group_size=32) == {"mse": "everywhere"}
    assert found(scheme="int8-static", data=data) == {"smoothquant": here, "rtn": "everywhere", "ranges": here}
    assert found(scheme="int8", algorithm="gptq", data=data) == {"gptq": here}
