"""The verifier: what is on disk is what was meant, and a single other bit is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.outputs import NORM, WEIGHT, UnderWay, under_way

from quantcli import formats
from quantcli.conversion.checkpoint import writer
from quantcli.conversion.checkpoint.verify import Verifier
from quantcli.core.tensors import TensorSpec
from quantcli.errors import VerificationError

RECIPES: dict[str, dict[str, Any]] = {
    "int4": {"scheme": "int4", "group_size": 32},
    "gptq": {"scheme": "int4", "group_size": 32, "format": "gptq"},
    "nf4-double": {"scheme": "nf4-double"},
    "cast": {"scheme": "bf16"},
}


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SLAB_ELEMENTS", 1024)


def check(output: UnderWay, results: dict[str, writer.LayerResult]) -> None:
    verifier = Verifier(output.file, output.plan, output.layout.specs)
    for name, result in results.items():
        verifier.check(output.layer(name), result)


def flip(output: UnderWay, tensor: str, at: int) -> None:
    """Change one bit of a tensor on disk."""
    content = bytearray(output.file.read_bytes())
    content[output.destinations[tensor].offset + at] ^= 1
    output.file.write_bytes(content)


@pytest.mark.parametrize("kind", RECIPES)
def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, kind: str) -> None:
    output = under_way(tmp_path / "out", **RECIPES[kind])
    results = {name: output.stream(name) for name in (WEIGHT, NORM)}
    check(output, results)
    for name, spec in output.layout.specs.items():
        for at in (0, spec.nbytes - 1):
            flip(output, name, at)
            with pytest.raises(VerificationError, match="what was read back is not what was written"):
                check(output, results)
            flip(output, name, at)
    check(output, results)


def test_the_place_of_a_difference_is_named(tmp_path: Path) -> None:
    output = under_way(tmp_path / "out", **RECIPES["int4"])
    results = {WEIGHT: output.stream(WEIGHT)}
    layer = output.layer(WEIGHT)
    assert layer.scheme is not None
    codes = formats.quantized_format(output.plan.format).codes_name(WEIGHT, layer.scheme)
    flip(output, codes, output.layout.specs[codes].nbytes - 1)
    with pytest.raises(VerificationError, match=f"{WEIGHT}, rows 56 to 64"):
        check(output, results)


def test_tensors_that_were_not_planned_are_refused(tmp_path: Path) -> None:
    output = under_way(tmp_path / "out", scheme="int8")
    for specs in ({NORM: TensorSpec("F16", (128,))}, {"another": TensorSpec("F32", (1,))}):
        with pytest.raises(VerificationError, match=f"the first is '{next(iter(specs))}'"):
            Verifier(output.file, output.plan, output.layout.specs | specs)
