"""The bytes of artifacts: what small models became when ``golden.json`` was written, they still become.

A commit that means to change artifacts writes the file anew, and its message says which cases changed and why:

    python tests/support/golden.py --write tests/golden.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import golden

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
CASES = list(golden.cases())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    golden.build(root)
    return root


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _marked(case: golden.Case) -> object:
    return pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else [])


@pytest.mark.parametrize("case", [_marked(case) for case in CASES])
def test_bytes_are_those_of_the_golden_file(case: golden.Case, models: Path) -> None:
    if case.products and golden.processor() != GOLDEN["processor"]:
        pytest.skip(f"products of floats are rounded by the processor, here not {GOLDEN['processor']}")
    assert golden.run(case, models) == GOLDEN["cases"][case.name]


def test_cases_are_those_of_the_golden_file() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert set(names) == set(GOLDEN["cases"])
