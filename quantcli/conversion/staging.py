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

    @property
    def is_interrupted(self) -> bool:
        """Whether something lies there that the command that began it continues."""
        return self.checkpoint.exists() or self._journal_path.exists()

    def begin_anew(self) -> None:
        """Start over whatever lies there: for work that is not continued."""
        self._remove_all_but(_LOCK)

    def keep_scratch(self) -> None:
        """Remove all that an interrupted run left but its journal and what lies in `scratch`."""
        self._remove_all_but(_LOCK, self._journal_path.name, self.scratch.name)

    def _remove_all_but(self, *names: str) -> None:
        for left in self.root.iterdir():
            if left.name in names:
                continue
            if left.is_dir():
                shutil.rmtree(left)
            else:
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

    def publish(self, *, single_file: str | None = None) -> None:
        """Rename the output to its place; the old one, if any, goes only once the new one stands.

        What was built beside a single file goes beside the target, and before it.
        """
        self.close()
        put_in_place(self.out, self.target, single_file, self.root / "replaced")
        self.discard()

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
