"""Outputs that are whole or absent: a hidden folder beside the target, a journal in it, a rename at the end.

``.NAME.partial/out`` becomes the output; ``journal.jsonl`` lists the tensors that are done, so that the
same command continues where a killed one stopped. Another command's leftovers are refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from quantcli.errors import InputError, NotProvenError, UsageError
from quantcli.system.files import explain

_LOCK = "lock"


class Staging:
    """A folder to build an output in. Use `open_staging`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.root = partial_folder(target)
        self.out = self.root / "out"
        self._journal_path = self.root / "journal.jsonl"
        #: For what does not fit into memory, and what was learned.
        self.scratch = self.root / "scratch"
        self._aside = self.root / "aside"
        self._replaced = self.root / "replaced"
        #: What a training that is interrupted continues from.
        self.checkpoint = self.root / "training.pt"
        self._journal: IO[str] | None = None

    def begin(self, fingerprint: str, *, force: bool) -> dict[str, dict[str, Any]]:
        """Start, or continue an interrupted run; returns the journal's records by tensor name.

        Raises:
            UsageError: what lies there was begun with another recipe or input, and ``force`` is False.
        """
        records = self._read_journal()
        if records and records[0].get("fingerprint") != fingerprint:
            if not force:
                raise UsageError(
                    f"An interrupted conversion to {self.target} was begun with another recipe, input or version.",
                    hint="Use --force to discard it and start anew.",
                )
            records = []
        if self._aside.exists():
            shutil.rmtree(self.out, ignore_errors=True)
            self._aside.rename(self.out)
        # A kill between the last rename and the end leaves a journal of what stands in its place already.
        if not self.out.is_dir() or not any(self.out.iterdir()):
            records = []
        if not records:
            shutil.rmtree(self.out, ignore_errors=True)
            shutil.rmtree(self.scratch, ignore_errors=True)
            self._journal_path.unlink(missing_ok=True)
            self.checkpoint.unlink(missing_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        self._journal = self._journal_path.open("a", encoding="utf-8")
        if not records:
            self.record({"fingerprint": fingerprint})
        return {record["name"]: record for record in records[1:]}

    def set_aside(self) -> Path:
        """Make room for an output that is made of what is there now; returns where that lies until the end.

        A run that is continued finds it in its place again.
        """
        self.out.rename(self._aside)
        self.out.mkdir()
        return self._aside

    def begin_anew(self) -> None:
        """Start over whatever lies there: for work that is not continued."""
        for left in self.root.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != _LOCK:
                left.unlink()
        self.out.mkdir()

    def _read_journal(self) -> list[dict[str, Any]]:
        if not self._journal_path.exists():
            return []
        records = []
        text = self._journal_path.read_text(encoding="utf-8")
        # A kill can leave half a line at the end; what follows would then be appended to it.
        complete = text[: text.rfind("\n") + 1]
        if complete != text:
            self._journal_path.write_text(complete, encoding="utf-8")
        for line in complete.splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                return []
        return records

    def record(self, entry: dict[str, Any]) -> None:
        """Append one line to the journal."""
        assert self._journal is not None
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()

    def publish(self, *, single_file: str | None = None, built: Path | None = None) -> None:
        """Rename the output, or a folder ``built`` within it, to its place.

        The old one, if any, goes only once the new one stands. What was built beside a single file goes beside the
        target, and before it.
        """
        self.close()
        put_in_place(built or self.out, self.target, single_file, self._replaced)
        self.discard()

    def put_back(self) -> None:
        """Give an old output its place back where a kill came between two renames."""
        if self._replaced.exists() and not self.target.exists():
            self._replaced.rename(self.target)

    def close(self) -> None:
        """Close the journal."""
        if self._journal:
            self._journal.close()
            self._journal = None

    def discard(self) -> None:
        """Remove everything that is not the output."""
        self.close()
        shutil.rmtree(self.root, ignore_errors=True)


def put_in_place(built: Path, target: Path, single_file: str | None, aside: Path) -> None:
    """Rename what a folder holds to its place; the old output, if any, goes only once the new one stands.

    Args:
        built: the folder that becomes ``target``, or in which the single file lies, and what goes beside that.
        target: the place.
        single_file: the output's name where it is a file. What else was built goes beside the target, and before it.
        aside: where an old folder waits meanwhile.
    """
    if single_file:
        for companion in sorted(built.iterdir()):
            if companion.name != single_file:
                companion.replace(target.parent / companion.name)
        built = built / single_file
    if target.is_dir():
        # Of a run that was killed once its output stood.
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        try:
            built.rename(target)
        except OSError:
            aside.rename(target)
            raise
    else:
        built.replace(target)


def refuse_to_overwrite(built: Path, target: Path) -> None:
    """Raise UsageError where a file that goes beside a single file exists."""
    for file in built.iterdir():
        beside = target.parent / file.name
        if beside != target and beside.exists():
            raise UsageError(f"The output {beside} exists.", "Use --force to replace it.")


def partial_folder(target: Path) -> Path:
    """Where an output is built before it is renamed."""
    absolute = target.absolute()
    return absolute.parent / f".{absolute.name}.partial"


@contextmanager
def open_staging(target: Path) -> Iterator[Staging]:
    """A locked staging folder. An error removes it; an interruption, or a proof without an answer, leaves it.

    What is left is continued by the next run.

    Raises:
        InputError: the place cannot be written, the disk is full, or another process builds this output.
    """
    staging = Staging(target)
    try:
        staging.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(staging.root / _LOCK, timeout=0)
        with lock:
            staging.put_back()
            try:
                yield staging
            except (KeyboardInterrupt, NotProvenError):
                staging.close()
                raise
            except UsageError:
                # Nothing was begun, or something that is not ours to throw away.
                staging.close()
                _remove_if_fresh(staging)
                raise
            except BaseException:
                staging.discard()
                raise
    except Timeout as error:
        raise InputError(f"Another process is writing {target}.", "Wait for it, or choose another -o.") from error
    except OSError as error:
        raise explain(error, target) from error


def _remove_if_fresh(staging: Staging) -> None:
    if not staging.out.exists():
        staging.discard()
