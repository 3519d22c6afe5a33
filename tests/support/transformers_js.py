"""The package @huggingface/transformers under Node: installed once outside of the repository, and run on jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RELEASE = "4.3.2"
#: A folder with node_modules, in place of one that is installed.
FOLDER = "QUANTCLI_NODE_PACKAGES"

_SCRIPT = Path(__file__).with_suffix(".mjs")
#: Without scripts: they fetch CUDA libraries, which no test uses.
_INSTALL = (
    "npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1", "--fetch-timeout=30000",
)  # fmt: skip
_PATIENCE_S = 120


def packages() -> Path:
    """A folder with the package, which is installed there where it is not; a test that needs it is skipped without.

    It takes half a minute and 475 MB, once.
    """
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("there is no Node")
    if given := os.environ.get(FOLDER):
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = cache / "quantcli-tests" / f"transformers.js-{RELEASE}"
    if not (place / "node_modules").is_dir():
        _install(place)
    return place


def _install(place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        made = Path(folder) / "made"
        made.mkdir()
        (made / "package.json").write_text('{"private": true}')
        command = [*_INSTALL, f"@huggingface/transformers@{RELEASE}"]
        try:
            done = subprocess.run(command, cwd=made, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
        except subprocess.TimeoutExpired:
            pytest.skip(f"npm took more than {_PATIENCE_S} s to install the package; name it with {FOLDER}")
        if done.returncode:
            pytest.skip(f"npm cannot install the package: {done.stderr.strip()[-200:]}")
        if not place.exists():  # or another run of the tests was faster
            made.rename(place)


def run(jobs: Sequence[Mapping[str, Any]], place: Path) -> list[Any]:
    """What the script beside this file makes of jobs: arrays, or lists of tokens."""
    (place / "jobs.json").write_text(json.dumps(jobs))
    results = place / "results.json"
    command = ["node", str(_SCRIPT), str(packages()), str(place / "jobs.json"), str(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [_read(job, each) for job, each in zip(jobs, json.loads(results.read_text()), strict=True)]


def _read(job: Mapping[str, Any], result: Mapping[str, Any]) -> Any:
    assert "error" not in result, f"{job}: {result['error']}"
    return result["tokens"] if "tokens" in result else np.array(result["data"]).reshape(result["dims"])


def told(feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays as the script reads them."""
    return {
        name: {"type": value.dtype.name, "data": value.ravel().tolist(), "dims": list(value.shape)}
        for name, value in feeds.items()
    }
