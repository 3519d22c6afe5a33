"""Outputs that are whole or absent: a hidden folder beside the target, a journal in it, a rename at the end.

``.NAME.partial/out`` becomes the output; ``journal.jsonl`` lists the tensors that are done, so that the
same command continues where a killed one stopped. Another command's leftovers are refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from quantcli.errors import DiskFullError, InputError, NotProvenError, RankError, UsageError
from quantcli.system import ranks
from quantcli.system.files import explain, force_entry, force_to_disk, temporary_folder

_LOCK = "lock"


class Staging:
    """A folder to build an output in. Use `open_staging`."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.root = partial_folder(target)
        #: Where the output is built, which all ranks see.
        self.out = self.root / "out"
        self._journal_path = self.root / "journal.jsonl"
        #: For what does not fit into memory, and what was learned.
        self.scratch = self.root / "scratch"
        self._aside = self.root / "aside"
        self._replaced = self.root / "replaced"
        #: What a training that is interrupted continues from.
        self.checkpoint = self.root / "training.pt"
        self._journal: IO[str] | None = None
        #: Whether this run found nothing that it continues.
        self.is_new = False
        #: Lies there with codes that were chosen from data.
        self._calibrated = self.root / "calibrated"

    @property
    def journals(self) -> list[Path]:
        """Journals of what other ranks have done."""
        return sorted(self.root.glob("journal-*.jsonl"))

    def begin(self, fingerprint: str, *, force: bool, kept: Path | None = None) -> dict[str, dict[str, Any]]:
        """Start, or continue an interrupted run; returns the journal's records by tensor name.

        Args:
            fingerprint: of all that decides what is built.
            force: whether leftovers of anything else are discarded.
            kept: the folder of what the journal speaks of; `out` by default.

        Raises:
            UsageError: what lies there was begun with another recipe or input, and ``force`` is False.
        """
        records = _records(self._journal_path)
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
        kept = kept or self.out
        if not kept.is_dir() or not any(kept.iterdir()):
            records = []
        self.is_new = not records
        if not records:
            shutil.rmtree(self.out, ignore_errors=True)
            shutil.rmtree(self.scratch, ignore_errors=True)
            self._journal_path.unlink(missing_ok=True)
            self.checkpoint.unlink(missing_ok=True)
            self._calibrated.unlink(missing_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        self._journal = self._journal_path.open("a", encoding="utf-8")
        if not records:
            self.record({"fingerprint": fingerprint})
            records = [{}]
        else:
            records += self._taken_over()
        for journal in self.journals:
            journal.unlink()
        return ranks.broadcast({record["name"]: record for record in records[1:]})

    def _taken_over(self) -> list[dict[str, Any]]:
        """The records of other ranks, now in the journal."""
        others = [record for journal in self.journals for record in _records(journal)]
        for record in others:
            self.record(record)
        return others

    def set_aside(self) -> Path:
        """Make room for an output that is made of what is there now; returns where that lies until the end.

        A run that is continued finds it in its place again.
        """
        self.out.rename(self._aside)
        self.out.mkdir()
        return self._aside

    @property
    def is_interrupted(self) -> bool:
        """Whether something lies there that the command that began it continues."""
        return self.checkpoint.exists() or self._journal_path.exists()

    @property
    def is_costly(self) -> bool:
        """Whether what lies there took long: codes chosen from data, or a training."""
        return self.checkpoint.exists() or self._calibrated.exists()

    def note_calibrated(self) -> None:
        """Say that codes lie there which were chosen from data."""
        self._calibrated.touch()

    @property
    def is_no_loss(self) -> bool:
        """Whether this run began what lies there, and has trained nothing yet."""
        return self.is_new and not self.checkpoint.exists()

    def begin_anew(self) -> None:
        """Start over whatever lies there: for work that is not continued."""
        self.is_new = True
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
        """Close the journal; a line that the disk had no room for was told of when it was recorded."""
        if self._journal:
            with suppress(OSError):
                self._journal.close()
            self._journal = None

    def discard(self) -> None:
        """Remove everything that is not the output."""
        self.close()
        shutil.rmtree(self.root, ignore_errors=True)


class _Beside(Staging):
    """The folder as a rank other than the first sees it, which only adds to ``out``, and to a journal of its own."""

    def __init__(self, target: Path, own: Path) -> None:
        super().__init__(target)
        self._journal_path = self.root / f"journal-{ranks.rank()}.jsonl"
        self.root, self.scratch, self.checkpoint = own, own / "scratch", own / "training.pt"

    def begin(self, fingerprint: str, *, force: bool, kept: Path | None = None) -> dict[str, dict[str, Any]]:
        """Wait for the first rank to start or continue.

        Raises:
            InputError: this rank does not see its folder.
        """
        records: dict[str, dict[str, Any]] = ranks.broadcast({})
        if not self.out.is_dir():
            raise InputError(
                f"{self.target.absolute().parent} is not one folder for all processes of torchrun.",
                "Choose an output that all machines see, such as one on a network file system.",
            )
        self._journal = self._journal_path.open("w", encoding="utf-8")
        return records

    def begin_anew(self) -> None:
        """Leave that to the first rank."""

    def discard(self) -> None:
        """Leave what is shared to the first rank."""
        self.close()


def _records(journal: Path) -> list[dict[str, Any]]:
    """A journal's lines; none where one of them is damaged."""
    if not journal.exists():
        return []
    records: list[dict[str, Any]] = []
    text = journal.read_text(encoding="utf-8", errors="replace")
    # A kill can leave half a line at the end; what follows would then be appended to it.
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        journal.write_text(complete, encoding="utf-8")
    for line in complete.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return []
        if not isinstance(record, dict) or (records and not isinstance(record.get("name"), str)):
            return []
        records.append(record)
    return records


def put_in_place(built: Path, target: Path, single_file: str | None, aside: Path) -> None:
    """Rename what a folder holds to its place; the old output, if any, goes only once the new one stands.

    What was built is on the disk before it is renamed, and so are the new names before this returns.

    Args:
        built: the folder that becomes ``target``, or in which the single file lies, and what goes beside that.
        target: the place.
        single_file: the output's name where it is a file. What else was built goes beside the target, and before it.
        aside: where an old folder waits meanwhile.
    """
    force_to_disk(built)
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
    force_entry(target.absolute().parent)


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

    So does a disk that is full, where what is done took long. What is left is continued by the next run. Of ranks that
    share the work, the first has it, and the others help.

    Raises:
        InputError: the place cannot be written, the disk is full, or another process builds this output.
    """
    if not ranks.is_first():
        with temporary_folder() as own:
            yield _Beside(target, Path(own))
        return
    staging = Staging(target)
    try:
        staging.root.mkdir(parents=True, exist_ok=True)
        with _locked(staging.root):
            staging.put_back()
            try:
                yield staging
            except KeyboardInterrupt:
                staging.close()
                if not staging.is_interrupted:
                    staging.discard()
                raise
            except (NotProvenError, RankError):
                staging.close()
                raise
            except DiskFullError as error:
                staging.close()
                if not staging.is_costly:
                    staging.discard()
                    raise
                hint = f"Free some space: the same command continues with what is done, and kept in {staging.root}."
                raise DiskFullError(error.message, hint) from error
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


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Meanwhile no other process makes this file, which appears at once. Raises InputError where one does already.

    What is no file, such as /dev/stdout, has no lock.
    """
    place = target.resolve()
    if place.exists() and not place.is_file():
        yield
        return
    with open_staging(place) as staging:
        try:
            yield
        finally:
            staging.discard()


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold a folder's lock. Raises Timeout where another process has it.

    Windows removes no file that is open: there the lock is what is left of a folder that was discarded meanwhile.
    """
    lock, discarded = root / _LOCK, False
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                discarded = root.exists() and [each.name for each in root.iterdir()] == [_LOCK]
    finally:
        if discarded:
            with suppress(OSError):  # another process has taken it already
                lock.unlink(missing_ok=True)
                root.rmdir()


def _remove_if_fresh(staging: Staging) -> None:
    if not staging.out.exists():
        staging.discard()
