"""Values that are no numbers, or become none; weights that are no model; experts that are read one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.split_experts import SplitExperts
from quantcli.commands.convert import convert
from quantcli.conversion.checkpoint.stream import require_finite
from quantcli.errors import InputError


def written(folder: Path, **tensors: torch.Tensor) -> Path:
    file = folder / "model.safetensors"
    save_file({"fc.weight": torch.randn(64, 64), **{k.replace("__", "."): v for k, v in tensors.items()}}, file)
    return file


@pytest.mark.parametrize("scheme", ["fp16", "bf16", "int8", "int4", "nf4", "int8-dynamic"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["other__weight", "A_log", "norm__weight"])
def test_what_is_no_number_is_named(tmp_path: Path, scheme: str, value: float, name: str) -> None:
    tensor = torch.randn(64) if "norm" in name else torch.randn(64, 64)
    tensor.view(-1)[7] = value
    file = written(tmp_path, **{name: tensor})
    place = "row 7, column 0" if tensor.ndim == 1 else "row 0, column 7"
    with pytest.raises(InputError, match=rf"{name.replace('__', '.')} holds {value} at {place}"):
        convert(file, tmp_path / "out.safetensors", scheme=scheme)
    info = next(info for info in open_checkpoint(file).infos() if info.name == name.replace("__", "."))
    with pytest.raises(InputError, match=place):
        require_finite(info, open_checkpoint(file))


@pytest.mark.parametrize("scheme", ["fp16", "int8"])
def test_a_mask_keeps_its_infinities(tmp_path: Path, scheme: str) -> None:
    mask = torch.triu(torch.full((8, 8), -torch.inf), 1)
    convert(written(tmp_path, mask=mask), tmp_path / "out.safetensors", scheme=scheme)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["mask"].float(), mask)


def test_values_that_fp16_makes_zero_are_told(tmp_path: Path) -> None:
    file = written(tmp_path, tiny__weight=torch.randn(64, 64) * 1e-8)
    warnings = convert(file, tmp_path / "out.safetensors", scheme="fp16").warnings
    assert any("1 layer: values too small for fp16 become zero" in warning for warning in warnings)
    file = written(tmp_path, small__weight=torch.randn(64, 64) * 1e-2)
    assert not convert(file, tmp_path / "out.safetensors", scheme="fp16", force=True).warnings


def test_an_adapter_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    save_file({"q.lora_A.weight": torch.randn(8, 64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="is an adapter") as caught:
        open_checkpoint(tmp_path)
    assert "merge_and_unload" in str(caught.value.hint)


@pytest.mark.parametrize("turned", [True, False])
def test_fused_experts_are_read_one_by_one(tmp_path: Path, *, turned: bool) -> None:
    fused = torch.randn(2, 6, 8) if turned else torch.randn(2, 8, 6)
    file = written(tmp_path, experts__gate_up_proj=fused)
    parts = [
        {"name": f"experts.{e}.{leaf}.weight", "expert": e, "first": 4 * n, "shape": [4, 6], "turned": turned}
        for e in range(2)
        for n, leaf in enumerate(("gate_proj", "up_proj"))
    ]
    split = SplitExperts(open_checkpoint(file), {"experts.gate_up_proj": parts})
    assert sum(info.nbytes for info in split.infos()) == sum(info.nbytes for info in split.original.infos())
    whole = fused.transpose(1, 2) if turned else fused
    for expert in range(2):
        assert torch.equal(split.load(f"experts.{expert}.gate_proj.weight"), whole[expert, :4])
        assert torch.equal(split.load(f"experts.{expert}.up_proj.weight"), whole[expert, 4:])
        info = next(info for info in split.infos() if info.name == f"experts.{expert}.up_proj.weight")
        assert torch.equal(split.read_rows(info, 1, 3), whole[expert, 5:7])
