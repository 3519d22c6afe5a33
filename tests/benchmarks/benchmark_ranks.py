"""What a second process saves, as torchrun starts it: measured on this machine, in turns, and printed beside its limit.

Run: .venv/bin/python tests/benchmarks/benchmark_ranks.py [calibration] [traffic]

calibration  `calibrate` of a graph of the YOLO kind on 512 pictures, one process of one thread and two of one thread
             each, every process on a core of its own; bytes of the statistics must be equal
traffic      what ranks send each other for a Hessian of 1024 columns, and how fast

On a machine where others work as well, the time that passes says little: beside it stands the processor time of the
process that takes most, which on an idle machine is the time that passes.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from harness import line, main, show
from support.detector import Detector

#: Pictures, their sides, and how often each number of processes has its turn.
SAMPLES, SIDE, TURNS = 512, 160, 2
#: Times as fast with two processes as with one.
WANTED = 1.7

_SEND = """
import time, torch
from quantcli.system import ranks
from quantcli.system.messages import meet
from datetime import timedelta
with ranks.sharing(*meet(timedelta(minutes=5))):
    matrix = torch.ones(1024, 1024)
    ranks.gather(matrix)
    start = time.monotonic()
    for _ in range(20):
        ranks.broadcast(matrix)
    if ranks.is_first():
        print(20 * matrix.nbytes / (time.monotonic() - start))
"""


def _run(world: int, arguments: list[str]) -> tuple[float, float, str]:
    """Seconds that pass, processor time of the process that takes most, and what rank 0 prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    cores = sorted(os.sched_getaffinity(0))
    start = time.monotonic()
    started = []
    for number in range(world):
        environment = {**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number)}
        command = ["taskset", "-c", str(cores[number % len(cores)]), sys.executable, *arguments]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    printed = [process.stdout.read() if process.stdout else "" for process in started]
    spent = []
    for process in started:
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"a process ended with status {os.waitstatus_to_exitcode(status)}")
        spent.append(usage.ru_utime + usage.ru_stime)
    return time.monotonic() - start, max(spent), printed[0]


def calibration(folder: Path) -> None:
    """One process beside two, in turns."""
    import onnx

    model, data = folder / "model.onnx", folder / "data.npz"
    onnx.save(Detector(side=SIDE).graph(), model)
    pictures = np.random.default_rng(0).random((SAMPLES, 3, SIDE, SIDE), np.float32)
    (name,) = (value.name for value in onnx.load(model).graph.input)
    np.savez(data, **{name: pictures})
    passed: dict[int, list[float]] = {1: [], 2: []}
    worked: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(2 * TURNS):
        world = 1 + turn % 2
        output = folder / f"{world}.safetensors"
        command = ["-m", "quantcli", "calibrate", str(model), "--data", str(data), "-o", str(output), "--force"]
        seconds, most, _ = _run(world, [*command, "--samples", str(SAMPLES), "--quiet"])
        passed[world].append(seconds)
        worked[world].append(most)
        busy = os.getloadavg()[0]
        show(f"{world} of one thread, load {busy:.1f}", f"{seconds:.1f} s, {most:.1f} s CPU")
    equal = (folder / "1.safetensors").read_bytes() == (folder / "2.safetensors").read_bytes()
    line("statistics of one process and of two", "equal" if equal else "differ", "equal", equal)
    gain = statistics.median(passed[1]) / statistics.median(passed[2])
    work = min(worked[1]) / min(worked[2])
    line("two processes beside one, processor time of the slower", f"{work:.2f} x", f">= {WANTED}", work >= WANTED)
    line("two processes beside one, time that passes", f"{gain:.2f} x", f">= {WANTED}", gain >= WANTED)


def traffic(folder: Path) -> None:
    """Bytes a second between two processes of this machine."""
    _, _, printed = _run(2, ["-c", _SEND])
    show("sent from one process to another", f"{float(printed) / 1e9:.2f} GB/s")


PARTS = {
    "calibration": (calibration, "a graph of the YOLO kind, random weights, 512 pictures"),
    "traffic": (traffic, "a matrix of 4 MB, from process to process"),
}

if __name__ == "__main__":
    main(__doc__ or "", PARTS)
