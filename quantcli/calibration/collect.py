"""Run a graph on samples and observe its values, in memory that does not grow with the samples.

The values are declared as outputs of a copy of the graph. Where they are too many to be held at once, they are
taken in chunks: the samples run once for each, through just the part of the graph that leads to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.calibration.capture import capture_activations, in_chunks
from quantcli.calibration.observers import Observer, TensorStats
from quantcli.calibration.ranges import DEFAULT_METHOD
from quantcli.calibration.statistics import CalibrationStats
from quantcli.calibration.statistics_file import Provenance
from quantcli.data.fingerprint import Sketch
from quantcli.data.samples import Samples, batches, own_batches
from quantcli.models.session import Session
from quantcli.onnx.plan.plan import observed_tensors
from quantcli.system import ranks
from quantcli.system.files import temporary_folder
from quantcli.system.parallel import usable_cores
from quantcli.system.progress import Progress, Tracker

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    #: A batch of samples by the names of inputs, and their classes.
    Group = tuple[dict[str, np.ndarray], list[int | str | None]]

#: Samples used where nothing else is said: ranges settle after some dozens.
DEFAULT_SAMPLES = 128

#: Bytes of observed values that are held at a time.
CHUNK_BYTES = 256 << 20
#: A histogram in the making.
_OBSERVER_BYTES = 1 << 19


def collect(
    graph: ir.Model,
    samples: Samples,
    observed: Sequence[str] | None = None,
    *,
    model_sha256: str,
    method: str = DEFAULT_METHOD,
    seed: int = 0,
    batch_size: int = 1,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress | None = None,
) -> CalibrationStats:
    """Statistics of a graph's values over samples.

    Args:
        graph: a graph as `quantcli.onnx.graph.prepare.prepare` makes it; it is left as it is.
        samples: what to run it on.
        observed: names of floating-point inputs and values of nodes; by default those whose ranges static
            quantization may ask for. Others than floating-point ones are left out.
        model_sha256: hash of the model as the user gave it, for the provenance.
        method: how ranges will be chosen.
        seed: what samples were chosen by, for the provenance.
        batch_size: samples per run at the most.
        chunk_bytes: memory for values that are observed at a time; the largest value needs its own size in any case.
        progress: called with sample runs done and in all.

    Raises:
        InputError: the graph cannot be run on the samples.
    """
    names = list(dict.fromkeys(observed_tensors(graph) if observed is None else observed))
    with temporary_folder() as scratch:
        capture = capture_activations(graph, Path(scratch))
        first = next(batches(samples, batch_size))[0]
        sizes = {name: nbytes + _OBSERVER_BYTES for name, nbytes in capture.sizes(names, first).items()}
        chunks = list(in_chunks(sizes, chunk_bytes))
        tensors: dict[str, TensorStats] = {}
        tracker = Tracker(len(ranks.part(len(samples))) * len(chunks), progress)
        sketch = Sketch()
        for number, chunk in enumerate(chunks):
            groups = own_batches(samples, batch_size)
            groups = groups if number else _sketched(groups, sketch)
            tensors |= _observe(capture.session(chunk), chunk, groups, tracker)
    tensors = {name: tensors[name] for name in names if name in tensors}
    provenance = Provenance(
        method, len(samples), seed, model_sha256, ranks.first(lambda: samples.sha256), _merged(sketch).to_json()
    )
    return CalibrationStats(provenance, tensors)


def _merged(sketch: Sketch) -> Sketch:
    """What all ranks have seen."""
    merged = Sketch()
    for each in ranks.gather(sketch):
        merged.merge(each)
    return merged


def _sketched(groups: Iterator[Group], sketch: Sketch) -> Iterator[Group]:
    """The same batches, their samples added to a sketch on the way."""
    for feeds, labels in groups:
        for index in range(len(labels)):
            # A single sample can hold scalars, and states whose first axis counts something else.
            several = len(labels) > 1
            sketch.add({name: array[index : index + 1] if several else array for name, array in feeds.items()})
        yield feeds, labels


def _observe(
    session: Session | None,
    names: Sequence[str],
    groups: Iterator[Group],
    tracker: Tracker,
) -> dict[str, TensorStats]:
    """Statistics of one chunk's values over all ranks' samples; None: they are all inputs."""
    observers = {name: Observer() for name in names}
    with ThreadPoolExecutor(usable_cores()) as pool:
        for feeds, labels in groups:
            values = {name: feeds[name] for name in names if name in feeds}
            if session is not None:
                values |= session.run(feeds)
            # numpy lets the other threads run while it counts and compares.
            for done in [pool.submit(observers[name].update, value) for name, value in values.items()]:
                done.result()
            tracker.add(len(labels))
    totals = {name: Observer() for name in names}
    for name, observer in ranks.in_order(observers):
        totals[name].merge(observer)
    return {name: observer.result() for name, observer in totals.items()}
