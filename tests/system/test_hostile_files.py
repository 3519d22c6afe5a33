"""Files that are damaged, or forged: refused with a sentence that names them, or read; soon, and in little memory."""

from __future__ import annotations

import resource
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from support.damage import damaged
from support.readers import READERS, refusal

#: Damaged files for each reader; tests/benchmarks/fuzz_readers.py makes as many as there is time for.
COUNT = 40
#: What one file may take beyond what the process has.
SECONDS, MEMORY_BYTES = 20.0, 3 << 30


@contextmanager
def limits() -> Iterator[None]:
    """Too much memory is a MemoryError here, and too much time a TimeoutError."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"a file is read for more than {SECONDS:g} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited by what Linux tells of it")
@pytest.mark.parametrize("name", READERS)
def test_damage_is_refused_by_the_files_name_or_harmless(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    path = tmp_path / "given" / reader.file
    path.parent.mkdir(parents=True)
    reader.beside(tmp_path / "given")
    contents = reader.seeds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in contents:
            path.write_bytes(content)
            assert refusal(reader, path) is None
        with limits():
            for seed in range(COUNT):
                path.write_bytes(damaged(contents[seed % len(contents)], reader.file, seed))
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                error = refusal(reader, path)
                if error is not None:
                    said = str(error)
                    assert "given" in said or reader.file in said or "--" in said, (seed, said)
                    assert "\n" not in said and len(said) < 3000, (seed, said)
