"""The manifest: what earlier, newer and foreign files say is read, and what is written has its order and no blanks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantcli.core.manifest import Manifest, ManifestLayer
from quantcli.errors import InputError

WRITTEN = {
    "quantcli": "0.1.0",
    "input_sha256": "ab",
    "format": "gptq",
    "scheme": "int4",
    "algorithm": "gptq",
    "recipe": {"scheme": "int4", "target": None},
    "source": {"format": "awq"},
    "calibration": {"samples": 3},
    "calibration_fingerprint": {"kind": "tokens"},
    "layers": {
        "a.weight": {"scheme": "int4", "algorithm": "mse", "note": "no token seen", "sqnr_db": 20.5},
        "b.weight": {"dtype": "BF16", "reason": "norm"},
        "c": {"node": "n", "mode": "static", "scheme": "int8"},
    },
    "verified": {"runtime": {"checked": False, "class": None}},
}


def test_what_was_written_is_read_and_written_again() -> None:
    manifest = Manifest.parse(json.dumps(WRITTEN), Path("m"))
    assert json.dumps(manifest.to_json()) == json.dumps(WRITTEN)
    assert manifest.layers["c"] == ManifestLayer(node="n", mode="static", scheme="int8")
    assert manifest.layer_schemes() == {"int4": 1, "int8": 1}


def test_what_is_not_known_is_kept() -> None:
    newer = {"layers": {"a": {"scheme": "int3", "shape": [1]}}, "signature": {"by": None}}
    assert Manifest.parse(json.dumps(newer), Path("m")).to_json() == newer


@pytest.mark.parametrize("text", [None, "{}", "[]", "3"])
def test_a_model_of_others_says_nothing(text: str | None) -> None:
    assert Manifest.parse(text, Path("m")) == Manifest()
    assert Manifest.parse(text, Path("m")).layer_schemes() == {}


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"layers": []}', '{"layers": {"a": 3}}'])
def test_damage_is_refused_with_the_models_name(text: str) -> None:
    with pytest.raises(InputError, match="m holds a damaged quantcli manifest"):
        Manifest.parse(text, Path("m"))
