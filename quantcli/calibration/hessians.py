"""What gptq must know of the layers of a graph: sums of x x^T of their inputs over samples, taken with onnxruntime.

A sum's size is the square of a layer's columns. So they are taken as many at a time as fit in memory, each time
through just the part of the graph that leads to their inputs, and then kept in a folder; inputs that several
layers share are taken once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.algorithms.gptq import Options as GptqOptions
from quantcli.calibration.capture import ActivationCapture, capture_activations, in_chunks
from quantcli.core.tensors import Hessian
from quantcli.data.samples import Samples, batches
from quantcli.onnx.plan.layer_inputs import LayerInput
from quantcli.onnx.plan.plan import GraphPlan, NodePlan
from quantcli.system import ranks
from quantcli.system.files import require_space
from quantcli.system.parallel import torch_threads
from quantcli.system.progress import Progress, Tracker

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

#: Bytes of sums, and of the values they are taken of, that are held at a time; the sums of some of the samples, which
#: are added to the rest afterwards, take as much once more.
CHUNK_BYTES = 1 << 29

#: What weight a Hessian is of: its name, whether it is turned, and in how many groups it is read.
_Layer = tuple[str, bool, int]


class CollectedHessians:
    """The Hessians of a plan's layers, in files. Use `collect_hessians`."""

    def __init__(self, files: Mapping[LayerInput, Path], problems: Mapping[LayerInput, str], plan: GraphPlan) -> None:
        self._files, self._problems, self._damping = files, problems, plan.damping or GptqOptions().damping
        self._inputs: dict[_Layer, list[LayerInput]] = {}
        for node in plan.nodes:
            if node.input is not None:
                inputs = self._inputs.setdefault(_layer(node), [])
                if (read := _of_value(node.input)) not in inputs:
                    inputs.append(read)

    def of(self, node: NodePlan) -> Hessian:
        """The Hessian of a layer; a weight that several nodes read has the sum of theirs."""
        import numpy as np
        import torch

        first, *others = (torch.from_numpy(np.load(self._files[read])) for read in self._inputs_of(node))
        for other in others:
            first += other
        return Hessian(first, self._damping)

    def problem(self, node: NodePlan) -> str | None:
        """Why a layer's inputs tell nothing, or None."""
        if _layer(node) not in self._inputs:
            return "its input was not observed"
        return next((self._problems[read] for read in self._inputs_of(node) if read in self._problems), None)

    def _inputs_of(self, node: NodePlan) -> list[LayerInput]:
        return self._inputs[_layer(node)]


def _layer(node: NodePlan) -> _Layer:
    assert node.input is not None
    return node.name, node.input.weight_turned, node.input.groups


def _of_value(needed: LayerInput) -> LayerInput:
    """The same for all weights that read a value in one way, however they lie in the file."""
    return replace(needed, weight_turned=False)


def collect_hessians(
    graph: ir.Model,
    plan: GraphPlan,
    samples: Samples,
    folder: Path,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    progress: Progress | None = None,
) -> CollectedHessians:
    """Sums of x x^T over samples for every layer of a plan that gptq quantizes.

    Args:
        graph: the graph that the plan was made for; it is left as it is.
        plan: says which layers, and what they read.
        samples: what to run it on.
        folder: where the sums are kept, a new one.
        chunk_bytes: memory for sums at a time; the largest needs its own size in any case.
        progress: called with sample runs done and in all.

    Raises:
        InputError: the graph cannot be run on the samples, or the disk has no room for the sums.
    """
    inputs = list(dict.fromkeys(_of_value(node.input) for node in plan.nodes if node.input))
    # One that was interrupted may have left it.
    folder.mkdir(exist_ok=True)
    require_space(folder, sum(read.gram_bytes for read in inputs) if ranks.is_first() else 0)
    capture = capture_activations(graph, folder)
    nbytes = capture.sizes(list(dict.fromkeys(read.value for read in inputs)), next(batches(samples, 1))[0])
    # In graph order, so that early chunks need little of the graph.
    order = {name: number for number, name in enumerate(nbytes)}
    inputs.sort(key=lambda read: order[read.value])
    chunks = list(in_chunks({read: read.gram_bytes + nbytes[read.value] for read in inputs}, chunk_bytes))
    tracker = Tracker(len(samples) * len(chunks) // ranks.world(), progress)
    files: dict[LayerInput, Path] = {}
    problems: dict[LayerInput, str] = {}
    for chunk in chunks:
        sums = _summed(capture, chunk, samples, tracker)
        for read, (total, rows) in sums.items():
            problem = _problem(total, rows)
            if problem:
                problems[read] = problem
            files[read] = folder / f"{len(files)}.npy"
            if ranks.is_first():
                _save(files[read], total)
    return CollectedHessians(files, problems, plan)


class _Sums:
    """Sums of x x^T, float32 ``[groups, columns, columns]``, and numbers of rows x, of each input of a chunk."""

    def __init__(self, chunk: Iterable[LayerInput]) -> None:
        import torch

        self.totals = {read: torch.zeros(read.groups, read.columns, read.columns) for read in chunk}
        self.counts = dict.fromkeys(self.totals, 0)

    def clear(self) -> None:
        """Begin anew in the same memory."""
        for read, total in self.totals.items():
            total.zero_()
            self.counts[read] = 0

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """One batch."""
        for read, total in self.totals.items():
            for rows in read.rows(values[read.value]):
                total.baddbmm_(rows.mT, rows)
                self.counts[read] += rows.shape[1]

    def merge(self, other: _Sums) -> None:
        """Add those of every rank, in their order."""
        parts = {read: (total, other.counts[read]) for read, total in other.totals.items()}
        for read, (total, count) in ranks.in_order(parts):
            self.totals[read] += total
            self.counts[read] += count


def _summed(
    capture: ActivationCapture, chunk: Iterable[LayerInput], samples: Samples, tracker: Tracker
) -> dict[LayerInput, tuple[np.ndarray, int]]:
    """Sums and numbers of rows over all samples; those of each run of samples are added in the runs' order."""
    sums, own = _Sums(chunk), _Sums(chunk)
    names = list(dict.fromkeys(read.value for read in sums.totals))
    # Products take all cores between the runs.
    session, size = capture.session(names, shared=True), samples.fixed_batch or 1
    with torch_threads():
        for _, numbers in ranks.runs(len(samples) // size):
            own.clear()
            for feeds, labels in batches(samples.part(range(numbers.start * size, numbers.stop * size)), 1):
                values = {name: feeds[name] for name in names if name in feeds}
                if session is not None:
                    values |= session.run(feeds)
                own.add(values)
                tracker.add(len(labels))
            sums.merge(own)
    return {read: (total.numpy(), sums.counts[read]) for read, total in sums.totals.items()}


def _problem(total: np.ndarray, rows: int) -> str | None:
    import numpy as np

    if not rows:
        return "its input was empty in every sample"
    if not np.isfinite(total).all():
        return "its input was not finite in every sample"
    return None if total.any() else "its input was zero in every sample"


def _save(path: Path, values: np.ndarray) -> None:
    import numpy as np

    np.save(path, values)
