"""What all benchmarks share: what is measured, where, and figures beside their limits."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
COMMAND = str(Path(sys.executable).with_name("quantcli"))

#: A part of a benchmark, called with an empty folder, and the names of the model and data that it measures.
Part = tuple[Callable[[Path], None], str]


def line(what: str, value: str, limit: str, holds: bool) -> None:
    """One figure beside its limit."""
    print(f"{what:58} {value:>16}   {limit:24} {'ok' if holds else 'MISSED'}", flush=True)


def show(what: str, value: str) -> None:
    """A figure without a limit."""
    print(f"{what:58} {value:>16}", flush=True)


def commit() -> str:
    """The commit of the quantcli that is measured, with "dirty" where its files differ from it."""
    import quantcli

    git = ["git", "-C", str(Path(quantcli.__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "."], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "of no repository"
    return head.strip()[:12] + (", dirty" if changed.stdout else "")


def machine() -> str:
    """The processor, its cores and features, and the memory."""
    import psutil

    from quantcli.system.hardware import cpu_features, cpu_name
    from quantcli.system.parallel import usable_cores

    features = ", ".join(cpu_features()) or "features unknown"
    return f"{cpu_name()}, {usable_cores()} cores ({features}), {psutil.virtual_memory().total / 1e9:.0f} GB"


def main(doc: str, parts: Mapping[str, Part]) -> None:
    """Say what is measured and where, and run the parts that the command line names, or all."""
    chosen = sys.argv[1:] or [*parts]
    if not set(chosen) <= parts.keys():
        print(doc)
        sys.exit(0 if {"-h", "--help"} & set(chosen) else 2)
    import quantcli

    print(f"quantcli {quantcli.__version__}, commit {commit()}\n{machine()}", flush=True)
    for name in chosen:
        run, subject = parts[name]
        print(f"\n{name}: {subject}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            run(Path(scratch))
