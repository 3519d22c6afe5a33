"""NaN among the weights, and among what flows through the model: every algorithm that looks at data refuses both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.plain_blocks import token_file

from quantcli import convert
from quantcli.errors import InputError
from quantcli.planning.recipe import validate

pytestmark = pytest.mark.usefixtures("no_runtime_check")

BROKEN = "model.layers.1.mlp.up_proj.weight"
INT4: dict[str, Any] = {"scheme": "int4", "group_size": 32}
CHAINS: dict[str, dict[str, Any]] = {
    "gptq": INT4 | {"steps": ["gptq"]},
    "awq": INT4 | {"steps": ["awq"]},
    "autoround": INT4 | {"steps": [{"autoround": {"iterations": 2}}]},
    "tune": INT4 | {"steps": ["gptq", "tune"]},
    "qat": INT4 | {"steps": ["gptq", "qat"]},
    "smoothquant": {"scheme": "int8-dynamic", "steps": ["smoothquant"]},
    "int8-static": {"scheme": "int8-static"},
    "nf4": {"scheme": "nf4", "steps": ["gptq"]},
}


def refusal(models: Path, place: Path, recipe: dict[str, Any], **replaced: torch.Tensor) -> str:
    """What is said of a llama with some tensors replaced, of which nothing is left behind."""
    source, out = place / "llama", place / "out"
    shutil.copytree(models / "llama", source)
    tensors = load_file(source / "model.safetensors")
    assert replaced.keys() <= tensors.keys()
    save_file(tensors | replaced, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError) as caught:
        convert(source, out, recipe=validate(recipe, "recipe"), data=token_file(place / "ids.npz"))
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize("recipe", CHAINS.values(), ids=CHAINS)
def test_a_weight_that_is_no_number_is_named_with_its_place(
    models: Path, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    weight = load_file(models / "llama" / "model.safetensors")[BROKEN]
    weight[3, 5] = torch.nan
    assert f"{BROKEN} holds nan at row 3, column 5" in refusal(models, tmp_path, recipe, **{BROKEN: weight})


@pytest.mark.parametrize("recipe", CHAINS.values(), ids=CHAINS)
def test_activations_that_are_no_numbers_are_told_with_their_layer(
    models: Path, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    # Finite weights whose products are not: the first block returns infinities, and the second one NaN.
    name = "model.layers.0.mlp.down_proj.weight"
    weight = load_file(models / "llama" / "model.safetensors")[name].sign() * 3e38
    said = refusal(models, tmp_path, recipe, **{name: weight})
    if recipe in (CHAINS["autoround"], CHAINS["tune"]):  # they learn from what blocks return
        assert "model.layers.0 returns values that are not finite" in said
    else:
        assert "model.layers.1.self_attn.q_proj is given values that are not finite" in said
