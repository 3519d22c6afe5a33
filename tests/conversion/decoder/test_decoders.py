"""Tiny random decoders of every architecture: from the cache as from the whole text, and token for token as torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.decoders import TINY, greedy_in_genai, greedy_in_torch, tiny_decoder, torch_with_codes, without_rounding

import quantcli

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
