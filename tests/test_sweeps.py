"""The quick parts of the two sweeps, and the faults that are known: a new one fails, and so does one that is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import sweeping
from support.sweeping import FAULT, LATE, OK, Outcome

from quantcli.system import child

BENCHMARKS = Path(__file__).parent / "benchmarks"

#: What is still wrong, ``case column``. A line leaves with what mends it, and none comes.
KNOWN_ARCHITECTURES = frozenset[str]()
KNOWN_OPERATORS = frozenset[str]()


def quick_part(script: str, file: Path) -> dict[str, dict[str, Outcome]]:
    """Runs it as a person would, in a process without threads, which forks need."""
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--jobs", "2", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | sweeping.ENVIRONMENT, check=False)
    assert file.is_file(), done.stderr[-2000:]
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text())
    return {name: {column: Outcome(**value) for column, value in row.items()} for name, row in rows.items()}


def assert_only_known(found: dict[str, dict[str, Outcome]], known: frozenset[str]) -> None:
    faults = sweeping.faults(found)
    new = {case: found[case.split()[0]][case.split()[1]].why for case in sorted(faults - known)}
    assert not new, f"new faults: {json.dumps(new, indent=1)}"
    assert not known - faults, f"gone, and to be taken from the list: {sorted(known - faults)}"


@pytest.mark.slow
def test_architectures_run_after_conversion(tmp_path: Path) -> None:
    found = quick_part("sweep_architectures.py", tmp_path / "found.json")
    assert all(row["built"].verdict == OK for row in found.values())
    assert_only_known(found, KNOWN_ARCHITECTURES)


@pytest.mark.slow
def test_operators_compute_the_same_after_conversion(tmp_path: Path) -> None:
    found = quick_part("sweep_operators.py", tmp_path / "found.json")
    assert sum(outcome.verdict == OK for row in found.values() for outcome in row.values()) > len(found)
    assert_only_known(found, KNOWN_OPERATORS)


def test_a_fork_ends_with_its_time() -> None:
    import time

    done = sweeping.forked(lambda: time.sleep(30), 0.2)
    assert done.status is None
    assert done.seconds < 5


def test_a_fork_that_fails_says_why() -> None:
    done = sweeping.forked(lambda: {}["missing"], 20)
    assert done.status == 70
    assert done.last_line == "KeyError: 'missing'"
    assert sweeping.judged(done).verdict == FAULT


def test_a_fork_that_is_killed_is_a_fault() -> None:
    done = sweeping.forked(lambda: os.kill(os.getpid(), signal.SIGKILL), 20)
    assert done.status == -signal.SIGKILL
    assert sweeping.judged(done).verdict == FAULT


def test_an_interpreter_that_quantcli_starts_is_a_fork_that_answers() -> None:
    def asked() -> dict[str, Any]:
        vars(child)["subprocess"] = SimpleNamespace(**vars(subprocess) | {"Popen": sweeping.ForkedInterpreter})
        service = child.Service()
        service.start("builtins:dict", {"said": 1})
        answer = service.result(20)
        service.stop()
        return answer

    done = sweeping.forked(asked, 30)
    assert done.value == {"said": 1}, done.stderr


@pytest.mark.parametrize(("dry", "verdict"), [(0, LATE), (3, "refused")])
def test_a_refusal_that_a_dry_run_does_not_know_is_late(dry: int, verdict: str) -> None:
    def ended(status: int) -> sweeping.Ended:
        return sweeping.Ended(0, status, "", "Error: it cannot be.", 0.1)

    outcome = sweeping.judged(ended(3), lambda: ended(dry))
    assert outcome.verdict == verdict
    assert outcome.why == "Error: it cannot be."


def test_exit_4_and_a_traceback_are_faults() -> None:
    assert sweeping.judged(sweeping.Ended(0, 4, "", "Error: a defect", 0)).verdict == FAULT
    said = "Traceback (most recent call last):\nValueError: no"
    assert sweeping.judged(sweeping.Ended(0, 0, "", said, 0)).verdict == FAULT


def test_cases_are_thinned_out_evenly() -> None:
    assert sweeping.chosen([f"c{n}" for n in range(10)], None, 2) == ["c0", "c5"]
    assert sweeping.chosen(["a:x", "b:x"], ["b:*"], None) == ["b:x"]


def test_wrong_outputs_are_told_from_rounded_ones() -> None:
    import numpy
    from benchmarks.sweep_operators import _difference

    exact = numpy.linspace(-1, 1, 64, dtype=numpy.float32).reshape(8, 8)
    rounded = (exact * 127).round() / numpy.float32(127)
    assert not _difference({"y": exact}, {"y": rounded.astype(numpy.float32)}, 30, False)
    assert "dB" in _difference({"y": exact}, {"y": exact[::-1]}, 5, False)
    assert "shape" in _difference({"y": exact}, {"y": exact.reshape(64)}, 5, False)
    assert "outputs are" in _difference({"y": exact}, {"z": exact}, 5, False)
    assert "float64" in _difference({"y": exact}, {"y": exact.astype(numpy.float64)}, 5, False)
