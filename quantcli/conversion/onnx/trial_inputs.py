"""What two graphs are run on side by side: samples of the data, or inputs that are made up where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from quantcli.core.ports import Arrays, Port, dtype_family
from quantcli.data.made_up import FILLS, SPREADS, made_up_feeds, table_sizes
from quantcli.data.samples import Samples, batches
from quantcli.errors import InputError
from quantcli.models.session import Session

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

#: Numbers of samples, lengths of sequences and sides of images that are tried in turn where the model leaves them open.
_SIZES = (
    (1, 16, 64), (1, 128, 224), (1, 8, 8), (1, 4, 4), (1, 2, 2), (1, 3, 3), (1, 1, 1), (1, 32, 32), (1, 64, 128),
    (2, 2, 2), (3, 3, 3), (4, 4, 4), (8, 8, 8), (16, 16, 16), (2, 16, 64), (2, 128, 224), (4, 16, 64), (8, 16, 64),
    (4, 128, 224), (8, 128, 224), (3, 16, 64), (5, 16, 64), (6, 16, 64), (7, 16, 64), (10, 16, 64), (12, 16, 64),
    (16, 16, 64), (20, 16, 64), (32, 16, 64), (64, 16, 64), (100, 16, 64), (128, 16, 64),
)  # fmt: skip

#: Numbers of dimensions that are tried in turn where the model does not tell it.
_RANKS = (2, 3, 4, 1, 0)

#: Feeds with the number of samples in each, anew for each pass.
Feeds = Callable[[], Iterable[tuple[Mapping[str, "np.ndarray"], int]]]


@dataclass(frozen=True)
class NoFeeds:
    """Why there is nothing that a model runs on."""

    reason: str

    def refusal(self) -> InputError:
        """What a conversion ends with that nothing could prove."""
        return InputError(
            f"Nothing would show what the artifact computes: {self.reason}",
            "Give --data with inputs that the model runs on.",
        )


def of_samples(samples: Samples, most: int) -> Feeds:
    """The first samples, as many at a time as the model takes."""

    def feeds() -> Iterator[tuple[Mapping[str, np.ndarray], int]]:
        done = 0
        for arrays, labels in batches(samples, 1):
            yield arrays, len(labels)
            done += len(labels)
            if done >= most:
                return

    return feeds


def made_up(reference: Session, graph: ir.Model, *, mixed: bool = False) -> Feeds | NoFeeds:
    """Feeds that a model returns numbers for, with one sample more where it takes that; or why there are none.

    Args:
        reference: the model.
        graph: its graph, which tells the tables that an input is looked up in.
        mixed: whether zeros and ones at random are to follow integers and truth values that are all ones.
    """
    reasons = []
    for maker in _makers(_ports(reference, graph), table_sizes(graph)):
        for fill, spread in product(FILLS[:2] if _has_integers(maker.ports) else FILLS[:1], SPREADS):
            make = partial(maker.feeds, spread=spread)
            try:
                first = make(fill=fill)
                outputs = reference.run(first)
            except InputError as error:
                reasons.append(f"on made-up inputs, {error.message[0].lower()}{error.message[1:]}")
                break
            if has_numbers(outputs):
                return _with_others(reference, maker, make, fill, first, mixed=mixed)
        else:
            return NoFeeds("it returns no finite number for made-up inputs.")
    return NoFeeds(reasons[0])


def has_numbers(outputs: Mapping[str, Any]) -> bool:
    """Whether outputs have anything to compare: a finite number, or what is no float; or are empty by their shapes."""
    arrays = [array for value in outputs.values() for array in tensors_of(value)]
    floats = [array for array in arrays if array.size and dtype_family(array.dtype) == "float"]
    return len(floats) < len(arrays) or not arrays or any(_is_finite(array) for array in floats)


def tensors_of(value: Any) -> Iterator[np.ndarray]:
    """The tensors of an output, which may be a sequence or maps; an optional that is empty has none."""
    import numpy as np

    if isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)
    elif isinstance(value, dict):
        yield from (np.array(list(value)), np.array(list(value.values())))
    elif value is not None:
        yield np.asarray(value)


def _is_finite(values: np.ndarray) -> bool:
    """Whether any of some values is finite."""
    import numpy as np

    return bool(np.isfinite(values.astype(np.float64)).any())


@dataclass(frozen=True)
class _Maker:
    """Inputs of one size; see `made_up_feeds`."""

    ports: Sequence[Port]
    tables: Mapping[str, int]
    samples: int
    length: int
    side: int

    def feeds(self, *, spread: str, fill: str, more: int = 0) -> Arrays:
        """Inputs of so many samples more."""
        samples = self.samples + more
        return made_up_feeds(
            self.ports, samples, self.length, samples, side=self.side, tables=self.tables, fill=fill, spread=spread
        )


def _ports(reference: Session, graph: ir.Model) -> list[Port]:
    """A model's inputs; the runtime tells one of any number of dimensions no otherwise than a scalar."""
    unknown = {value.name for value in graph.graph.inputs if value.shape is None}
    return [replace(port, shape=None) if port.name in unknown else port for port in reference.inputs]


def _makers(ports: Sequence[Port], tables: Mapping[str, int]) -> Iterator[_Maker]:
    """Makers of inputs, none of which makes the shapes of an earlier one."""
    seen = []
    for rank in _RANKS if any(port.shape is None for port in ports) else (0,):
        known = [port if port.shape is not None else replace(port, shape=(None,) * rank) for port in ports]
        for samples, length, side in _SIZES:
            maker = _Maker(known, tables, samples, length, side)
            shapes = _shapes(maker.feeds(spread=SPREADS[0], fill=FILLS[0]))
            if shapes not in seen:
                seen.append(shapes)
                yield maker


def _with_others(
    reference: Session, maker: _Maker, make: Callable[..., Arrays], fill: str, first: Arrays, *, mixed: bool
) -> Feeds:
    """Feeds that a model runs on, and others that are made likewise as far as it runs on them."""
    found = [(first, maker.samples)]
    more = make(fill=fill, more=1)
    if _shapes(more) != _shapes(first) and _runs(reference, more):
        found.append((more, maker.samples + 1))
    if mixed and _has_integers(maker.ports):
        samples = found[-1][1]
        unlike = make(fill="mixed", more=samples - maker.samples)
        if _runs(reference, unlike):
            found.append((unlike, samples))
    return lambda: found


def _has_integers(ports: Sequence[Port]) -> bool:
    """Whether any input is of integers or truth values."""
    return any(port.dtype.kind in "iub" for port in ports)


def _shapes(feeds: Arrays) -> list[list[tuple[int, ...]]]:
    return [[array.shape for array in tensors_of(value)] for value in feeds.values()]


def _runs(reference: Session, feeds: Arrays) -> bool:
    try:
        reference.run(feeds)
    except InputError:
        return False
    return True
