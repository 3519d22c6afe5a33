"""What models are timed on: batches of DATA, or made-up values of the right shapes, which the report then says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.benchmarking.generation import NEW_TOKENS, wants_generation
from quantcli.conversion.onnx.trial_inputs import NoFeeds
from quantcli.conversion.onnx.trial_inputs import made_up as tried
from quantcli.core.ports import Arrays, Port, cache_ports
from quantcli.data.for_models import input_ports, source_for
from quantcli.data.made_up import DEFAULT_LENGTH, made_up_feeds
from quantcli.data.request import DataRequest
from quantcli.data.samples import Samples, batches, choose_samples
from quantcli.data.sources import is_text
from quantcli.data.sources.base import Sample, batch_sizes, hash_samples
from quantcli.errors import InputError, UsageError
from quantcli.models.batch_size import SIZES, least_batch_size
from quantcli.models.inputs import fit
from quantcli.models.session import session_of
from quantcli.models.source import ModelSource

if TYPE_CHECKING:
    import numpy as np

#: Different batches that runs take turns with; more would only fill memory.
_BATCHES = 4


@dataclass
class Feeds:
    """Batches to run on, by batch size, and what is to be said of them."""

    by_size: dict[int, list[Arrays]]
    source: str
    warnings: list[str] = field(default_factory=list)

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shapes of the inputs at the first batch size."""
        return {name: list(value.shape) for name, value in next(iter(self.by_size.values()))[0].items()}

    @property
    def sha256(self) -> str:
        """Hash of the batches of the first size."""
        return hash_samples(Sample(feeds, None) for feeds in next(iter(self.by_size.values())))


def load_feeds(
    sources: Sequence[ModelSource],
    request: DataRequest | None,
    sizes: Sequence[int] | None,
    *,
    seq_len: int | None = None,
    seed: int = 0,
) -> Feeds:
    """Batches for the models; without a request made-up values, of ``seq_len`` tokens and from ``seed``.

    Raises:
        UsageError: a batch size that the model cannot take.
        InputError: the data is missing, does not fit, or holds no whole batch; or there is none, and the model
            does not tell the shapes of its inputs.
    """
    if any(size < 1 for size in sizes or ()):
        raise UsageError("--batch-size counts samples: at least one is needed.")
    text = request is None or is_text(request.data)
    ports = input_ports(sources, text=text)
    # First dimensions that differ count no samples.
    known = batch_sizes(ports)
    fixed = next(iter(known)) if len(known) == 1 else None
    wrong = [size for size in sizes or () if fixed and size != fixed]
    if wrong:
        raise UsageError(f"--batch-size {wrong[0]}: {sources[0].path} takes {fixed} at a time.")
    graph = None if sizes or fixed else _graph_of_free_batch(sources, ports)
    if request is None:
        free = _graph_of_free_batch(sources, ports) if _has_free_length(ports) and seq_len is None else graph
        run = None if free is None else free.runner(shared=True).run
        tokens = seq_len or _length_that_runs(run, ports, _usual_length(sources), seed)
        make_up = partial(made_up_feeds, ports, seq_len=tokens, seed=seed)
        own = 1 if graph is None or run is None else least_batch_size(run, make_up)
        chosen = dict.fromkeys(sizes or (fixed or own or 1,))
        made = {size: [make_up(size)] for size in chosen}
        if not sizes and seq_len is None:
            made = _that_run(sources, made)
        feeds = Feeds(made, "made up")
        shapes = ", ".join(f"{name} {shape}" for name, shape in feeds.shapes.items())
        feeds.warnings.append(
            f"No --data was given: the inputs are made up ({shapes}). Latency may differ on real ones, whose "
            "shapes and values are others."
        )
        return feeds
    length = request.seq_len or (_usual_length(sources) if text and not _fixed_length(ports) else None)

    def chosen_samples(count: int) -> Samples:
        sized = replace(request, samples=count, seq_len=length, windows=True)
        return choose_samples(sized, source_for(sources, sized, ports))

    own = 1
    if graph is not None:
        several = chosen_samples(SIZES[-1])
        several.settle_batch_size(graph.runner(shared=True).run)
        own = several.fixed_batch or 1
    chosen = dict.fromkeys(sizes or (fixed or own,))
    samples = chosen_samples(max(chosen) * _BATCHES)
    return Feeds({size: _batches(samples, size) for size in chosen}, request.data, list(samples.warnings))


def _that_run(sources: Sequence[ModelSource], made: dict[int, list[Arrays]]) -> dict[int, list[Arrays]]:
    """Made-up batches; where the first graph does not run on those of usual lengths, such as `convert` finds."""
    source = next((source for source in sources if source.onnx and not cache_ports(source.onnx.inputs)), None)
    if source is None or source.onnx is None:
        return made
    session = session_of(source.onnx.path, shared=True)
    try:
        session.run(fit(next(iter(made.values()))[0], session.inputs, source.path))
    except InputError:
        found = tried(session, source.onnx.ir)
        return made if isinstance(found, NoFeeds) else {count: [dict(arrays)] for arrays, count in list(found())[:1]}
    return made


def _usual_length(sources: Sequence[ModelSource]) -> int:
    """Tokens of a sequence where nobody says it: fewer than usual where a model takes fewer, or is to generate more."""
    from quantcli.models.positions import longest_sequence

    room = NEW_TOKENS if wants_generation(sources) else 0
    folders = [source.folder for source in sources if source.checkpoint or Path(source.path).is_dir()]
    described = {folder for folder in folders if folder and (folder / "config.json").is_file()}
    return max(1, min([DEFAULT_LENGTH, *(longest_sequence(folder) - room for folder in described)]))


def _has_free_length(ports: Sequence[Port]) -> bool:
    return "input_ids" in {port.name for port in ports} and not _fixed_length(ports)


def _length_that_runs(
    run: Callable[[Mapping[str, np.ndarray]], object] | None, ports: Sequence[Port], usual: int, seed: int
) -> int:
    """As many tokens as usual, or fewer where a graph has a table of fewer places: nothing tells of that."""
    if run is None or not _has_free_length(ports):
        return usual
    lengths = [length for length in (usual, 64, 32, 16, 8, 4, 2, 1) if length <= usual]
    tried = (
        length
        for length in lengths
        if least_batch_size(run, partial(made_up_feeds, ports, seq_len=length, seed=seed), most=2)
    )
    return next(tried, usual)


def _graph_of_free_batch(sources: Sequence[ModelSource], ports: Sequence[Port]) -> ModelSource | None:
    """The first graph, where the inputs leave open how many samples it runs on; a decoder's cache is made for any."""
    if not any(port.shape and not isinstance(port.shape[0], int) for port in ports):
        return None
    return next((source for source in sources if source.onnx and not cache_ports(source.onnx.inputs)), None)


def _batches(samples: Samples, size: int) -> list[Arrays]:
    full = (feeds for feeds, labels in batches(samples, size) if len(labels) == size)
    found = list(islice(full, _BATCHES))
    if not found:
        raise InputError(
            f"{samples.source} holds no {size} samples of equal shape in a row, which --batch-size {size} needs.",
            "Give more data, or a smaller --batch-size.",
        )
    return found


def _fixed_length(ports: Sequence[Port]) -> bool:
    return any(
        port.name == "input_ids" and port.shape is not None and len(port.shape) == 2 and isinstance(port.shape[1], int)
        for port in ports
    )
