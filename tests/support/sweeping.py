"""What the sweeps share: a command in a forked process with a time limit, and the matrix of what came of it.

A process that has imported torch, transformers and onnx once is forked for every case, so that a case costs
milliseconds instead of the ten seconds of those imports, and a crash, a leak or an endless loop ends with its case.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from quantcli.system import child

OK, REFUSED, LATE, FAULT, SKIPPED = "ok", "refused", "late", "fault", "-"
#: What the environment has to say before anything is imported.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "NO_COLOR": "1",
    "COLUMNS": "200",
}
_LETTERS = {OK: "ok", REFUSED: "refused", LATE: "LATE", FAULT: "FAULT", SKIPPED: "-"}


@dataclass
class Outcome:
    """What came of one run: one of the five words, and the sentence that says why."""

    verdict: str
    why: str = ""
    seconds: float = 0.0


@dataclass
class Ended:
    """A forked process that ended. ``status`` is negative for a signal, None where its time was up."""

    status: int | None
    value: Any
    stdout: str
    stderr: str
    seconds: float

    @property
    def last_line(self) -> str:
        """Of what it said on stderr."""
        lines = self.stderr.strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def forked(work: Callable[[], Any], seconds: float) -> Ended:
    """Run ``work`` in a fork of this process, output captured; it and all that it started end after ``seconds``.

    What it returns has to be JSON; an exception is status 70, with its traceback on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="sweep-") as place:
        folder, start = Path(place), time.monotonic()
        process = os.fork()
        if process == 0:
            os.setsid()
            _leave(work, folder)
        status = _wait(process, start + seconds)
        value = folder / "value.json"
        return Ended(
            status,
            json.loads(value.read_text()) if value.is_file() else None,
            (folder / "stdout").read_text(errors="replace"),
            (folder / "stderr").read_text(errors="replace"),
            time.monotonic() - start,
        )


def _leave(work: Callable[[], Any], folder: Path) -> None:
    """In the fork: work, and never return."""
    status = 70
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        (folder / "value.json").write_text(json.dumps(work()))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(process: int, until: float) -> int | None:
    pause = 0.002
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            _kill_group(process)
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            _kill_group(process)
            os.waitpid(process, 0)
            return None
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)


def _kill_group(leader: int) -> None:
    """End what the fork started and left behind; its own group, made by setsid."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def quantcli(arguments: Sequence[str | Path], seconds: float) -> Ended:
    """Run the command line in a fork. ``value`` is its exit status; None where it ended otherwise."""
    return forked(lambda: _command(arguments), seconds)


class ForkedInterpreter:
    """In place of ``subprocess.Popen`` for the interpreters that quantcli starts: a fork, which has imported already.

    What such an interpreter would import, three seconds of it, is what a sweep's process has imported before.
    """

    def __init__(
        self, command: Sequence[str], *, stdin: int, stderr: IO[str], env: Mapping[str, str], **_: Any
    ) -> None:
        reading, writing = os.pipe()
        self.stdin = os.fdopen(writing, "wb") if stdin == subprocess.PIPE else None
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            os.close(reading)
            return
        status = 1
        try:
            os.close(writing)
            os.dup2(reading, 0)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(stderr.fileno(), 2)
            sys.stdin, sys.stdout, sys.stderr = (open(n, m, closefd=False) for n, m in ((0, "r"), (1, "w"), (2, "w")))  # noqa: SIM115
            os.environ.update(env)
            child.main(*command[-2:])
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status, or None where it runs."""
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, waited for."""
        until = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("fork", timeout or 0)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _command(arguments: Sequence[str | Path]) -> int:
    from quantcli.cli.app import main

    vars(child)["subprocess"] = SimpleNamespace(**vars(subprocess) | {"Popen": ForkedInterpreter})
    return main([str(argument) for argument in arguments])


def judged(done: Ended, dry: Callable[[], Ended] | None = None) -> Outcome:
    """A verdict on a run of the command line by its exit status alone; ``ok`` is still to be proven.

    Args:
        done: the run.
        dry: the same run with ``--dry-run``; a refusal that it does not know comes late.
    """
    message = error_of(done.stderr)
    if done.status is None:
        return Outcome(FAULT, f"no end within {done.seconds:.0f} s", done.seconds)
    if done.value is None:
        return Outcome(FAULT, f"ended with status {done.status}: {done.last_line}", done.seconds)
    if "Traceback (most recent call last)" in done.stderr:
        return Outcome(FAULT, f"exit {done.value} with a traceback: {done.last_line}", done.seconds)
    if done.value == 0:
        return Outcome(OK, "", done.seconds)
    if done.value in (2, 3):
        late = dry is not None and dry().value == 0
        return Outcome(LATE if late else REFUSED, message, done.seconds)
    return Outcome(FAULT, f"exit {done.value}: {message}", done.seconds)


def error_of(stderr: str) -> str:
    """The paragraph that says what is wrong, without names of temporary folders."""
    found = re.search(r"Error: .*", stderr, re.DOTALL)
    text = " ".join((found.group() if found else stderr[-600:]).split())
    return re.sub(r"/[\w./-]*/(?=[\w.-])", "", text)[:500]


def options(description: str | None, schemes: Sequence[str]) -> argparse.ArgumentParser:
    """The flags that both sweeps have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="GLOB", help="cases by name; may be repeated")
    parser.add_argument("--schemes", default=",".join(schemes), help="columns, by commas")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cases at a time")
    parser.add_argument("--limit", type=int, metavar="N", help="that many cases, spread over all of them")
    parser.add_argument("--seed", type=int, metavar="N", help="of the order, and of those that --limit draws")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every verdict with its reason")
    parser.add_argument("--resume", action="store_true", help="keep the verdicts that --json FILE holds already")
    parser.add_argument("--quick", action="store_true", help="a few cases of different kinds")
    return parser


def chosen(names: Iterable[str], only: Sequence[str] | None, limit: int | None, seed: int | None = None) -> list[str]:
    """Names that match, thinned out evenly, or drawn at random where there is a seed."""
    found = [n for n in names if not only or any(fnmatch.fnmatch(n, pattern) for pattern in only)]
    if not limit or len(found) <= limit:
        return found
    if seed is not None:
        return random.Random(seed).sample(found, limit)
    return [found[index * len(found) // limit] for index in range(limit)]


def sweep(
    names: Sequence[str],
    run: Callable[[str], dict[str, Outcome]],
    jobs: int,
    file: Path | None = None,
    known: Mapping[str, dict[str, Outcome]] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Outcome]]:
    """Run every case in a fork, ``jobs`` at a time, and print each as it ends.

    In a random order, the same for each seed, so that a sweep that is cut short has seen some of everything. Cases that
    are ``known`` are not run again.
    """
    found, running = {name: row for name, row in (known or {}).items() if name in set(names)}, {}
    waiting = [name for name in random.Random(seed).sample(names, len(names)) if name not in found]
    with tempfile.TemporaryDirectory(prefix="sweep-") as place:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop()
                result = Path(place) / f"{len(waiting)}.json"
                process = os.fork()
                if process == 0:
                    _case(run, name, result)
                running[process] = (name, result)
            process, status = os.wait()
            if process not in running:
                continue
            name, result = running.pop(process)
            died = {"sweep": asdict(Outcome(FAULT, f"the sweep itself ended with wait status {status}"))}
            row = json.loads(result.read_text()) if result.is_file() else died
            found[name] = {column: Outcome(**value) for column, value in row.items()}
            print(_line(name, found[name]), flush=True)
            if file:
                write(file, found)
    return {name: found[name] for name in names}


def _case(run: Callable[[str], dict[str, Outcome]], name: str, result: Path) -> None:
    try:
        row = {column: asdict(outcome) for column, outcome in run(name).items()}
    except BaseException as error:
        traceback.print_exc()
        row = {"sweep": asdict(Outcome(FAULT, f"the sweep itself: {type(error).__name__}: {error}"))}
    result.write_text(json.dumps(row))
    os._exit(0)


def _line(name: str, row: Mapping[str, Outcome]) -> str:
    return f"{name:52} " + " ".join(f"{column}={_LETTERS[outcome.verdict]}" for column, outcome in row.items())


def write(file: Path, found: Mapping[str, Mapping[str, Outcome]]) -> None:
    """Every verdict, with its reason."""
    rows = {name: {column: asdict(outcome) for column, outcome in row.items()} for name, row in found.items()}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    part.replace(file)


def read(file: Path) -> dict[str, dict[str, Outcome]]:
    """What ``write`` wrote; nothing where there is no such file."""
    rows = json.loads(file.read_text()) if file.is_file() else {}
    return {name: {column: Outcome(**value) for column, value in row.items()} for name, row in rows.items()}


def print_matrix(found: Mapping[str, Mapping[str, Outcome]]) -> None:
    """The matrix, totals per column, and each reason with how many cases it has."""
    columns = list(dict.fromkeys(column for row in found.values() for column in row))
    print("\n" + " " * 52, *(f"{column:>14}" for column in columns))
    for name, row in found.items():
        print(f"{name:52}", *(f"{_LETTERS[row[c].verdict] if c in row else '':>14}" for c in columns))
    for verdict in (OK, REFUSED, LATE, FAULT):
        counts = [sum(row[c].verdict == verdict for row in found.values() if c in row) for c in columns]
        print(f"{verdict:52}", *(f"{count:>14}" for count in counts))
    for verdict in (FAULT, LATE, REFUSED):
        reasons = Counter(kind(o.why) for row in found.values() for o in row.values() if o.verdict == verdict)
        print(f"\n{verdict}: {sum(reasons.values())}")
        for reason, count in reasons.most_common():
            print(f"  {count:4}  {reason[:230]}")


def kind(why: str) -> str:
    """A reason without what differs from case to case: names in quotes, numbers."""
    return re.sub(r"\d+(\.\d+)?", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", why))


def faults(found: Mapping[str, Mapping[str, Outcome]]) -> set[str]:
    """What a test compares with the faults that are known: ``case column`` of every fault and late refusal."""
    return {f"{n} {c}" for n, row in found.items() for c, o in row.items() if o.verdict in (FAULT, LATE)}
