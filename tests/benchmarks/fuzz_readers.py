"""Fuzzing of every reader of files, led by coverage: python tests/benchmarks/fuzz_readers.py [READER...] [--seconds N]

Needs atheris (pip install atheris), in which libFuzzer changes files and Python tells it which lines these reached.
A finding is whatever a reader raises that is no error meant for the user, takes longer than 10 seconds, or more than
2 GB. Each is kept once, in FINDINGS/READER/, by the place that it was raised at; the corpus stays in CORPUS/READER/.
Readers are those of tests/support/readers.py. What is found becomes a case of tests/system/test_hostile_files.py.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

SLOWEST_SECONDS, MOST_BYTES = 10, 2 << 30


def main() -> None:
    """Fuzz the readers that are named, or all of them, each in a process of its own."""
    from support.readers import READERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of: {', '.join(READERS)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--corpus", type=Path, default=Path("fuzzing/corpus"))
    parser.add_argument("--findings", type=Path, default=Path("fuzzing/findings"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # within this process
    options = parser.parse_args()
    if unknown := set(options.readers) - READERS.keys():
        parser.error(f"no such reader: {', '.join(sorted(unknown))}")
    if options.one:
        _fuzz(options.readers[0], options.corpus, options.findings, options.seconds)
        return
    for name in options.readers or READERS:
        _run(name, options)


def _run(name: str, options: argparse.Namespace) -> None:
    """Fuzz one reader for its time; a hang or a crash ends the process, and another goes on."""
    corpus, findings = options.corpus / name, options.findings / name
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    while (left := options.seconds - (time.monotonic() - started)) > 1:
        command = [sys.executable, __file__, name, "--one", "--seconds", str(int(left))]
        command += ["--corpus", str(corpus), "--findings", str(findings)]
        with (findings / "log.txt").open("ab") as log:
            subprocess.run(command, stdout=log, stderr=log, cwd=findings, check=False)
        if time.monotonic() - started < 2:
            break  # it did not even begin
    took = time.monotonic() - started
    found = [path.name for path in findings.iterdir() if path.name != "log.txt"]
    print(f"{name:40} {took / 60:6.1f} min {len(list(corpus.iterdir())):6} inputs {len(found):4} findings", flush=True)


def _fuzz(name: str, corpus: Path, findings: Path, seconds: int) -> None:
    import atheris

    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)) / "given"
    with atheris.instrument_imports(include=["quantcli"]):
        from support.readers import READERS, refusal

        reader = READERS[name]
        path = folder / reader.file
        path.parent.mkdir(parents=True)
        reader.beside(folder)
        for number, seed in enumerate(reader.seeds()):
            (corpus / f"seed{number}").write_bytes(seed)
            # Here, so that what a reader imports late is instrumented as well.
            if (refused := refusal(reader, _written(path, seed))) is not None:
                raise AssertionError(f"an honest file is refused: {refused}")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def one(data: bytes) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            refusal(reader, _written(path, data))
        except BaseException as error:  # whatever it is, it is what is looked for
            if isinstance(error, KeyboardInterrupt):
                raise
            _keep(findings, data, "".join(traceback.format_exception(error)), error)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown * 1024 > MOST_BYTES // 2:
            _keep(findings, data, f"memory grew by {grown} kB", None)

    limits = [f"-timeout={SLOWEST_SECONDS}", f"-rss_limit_mb={MOST_BYTES * 2 >> 20}", f"-max_total_time={seconds}"]
    atheris.Setup([sys.argv[0], *limits, "-max_len=65536", "-print_final_stats=1", str(corpus)], one)
    atheris.Fuzz()


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _keep(findings: Path, data: bytes, text: str, error: BaseException | None) -> None:
    """Keep an input and what it led to, once for each place in quantcli, and kind of error."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    own = [
        f"{frame.filename.rpartition('quantcli/')[2]}:{frame.lineno}"
        for frame in frames
        if "quantcli/" in frame.filename
    ]
    place = f"{type(error).__name__} {own[-1] if own else ''} {frames[-1].name if frames else text}"
    stem = findings / hashlib.sha256(place.encode()).hexdigest()[:12]
    if not stem.with_suffix(".txt").exists():
        stem.with_suffix(".bin").write_bytes(data)
        stem.with_suffix(".txt").write_text(f"{place}\n\n{text}")


if __name__ == "__main__":
    main()
