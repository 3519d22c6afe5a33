"""Models and data of commands of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.stages import write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `support.stages.STAGES` run on. To be left as it is."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))
