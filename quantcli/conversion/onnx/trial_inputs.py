"""What two graphs are run on side by side: samples of the data, or inputs that are made up where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from quantcli.conversion.onnx.solved_sizes import first_axes, named_axes, solved
from quantcli.conversion.onnx.tied_sizes import tied
from quantcli.core.ports import Arrays, Port, dtype_family, tensors_of
from quantcli.data.made_up import FILLS, SPREADS, Draw, counts_samples, lengths, made_up_feeds, table_sizes
from quantcli.data.samples import Samples, batches
from quantcli.errors import InputError
from quantcli.models.pieces import Runnable

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

#: Numbers of samples, lengths of sequences and sides of images that are tried in turn where the model leaves them open.
#: What follows the second is for sound: a frame of it, and longer ones up to a second.
_SIZES = (
    (1, 16, 64), (1, 128, 224), (1, 512, 256), (1, 1024, 320), (1, 16000, 640), (1, 8, 8), (1, 4, 4), (1, 2, 2),
    (1, 3, 3), (1, 1, 1), (1, 32, 32), (1, 64, 128), (2, 2, 2), (3, 3, 3), (4, 4, 4), (8, 8, 8), (16, 16, 16),
    (2, 16, 64), (2, 128, 224), (4, 16, 64), (8, 16, 64), (4, 128, 224), (8, 128, 224), (3, 16, 64), (5, 16, 64),
    (6, 16, 64), (7, 16, 64), (10, 16, 64), (12, 16, 64), (16, 16, 64), (20, 16, 64), (32, 16, 64), (64, 16, 64),
    (100, 16, 64), (128, 16, 64),
)  # fmt: skip

#: Lengths that each free axis has in turn where no sizes of all of them fit, for so many axes at the most: one may be
#: the sum of two others, or twice another, or be there to be repeated.
_AXIS_LENGTHS, _MOST_AXES = (8, 16, 1), 4

#: Elements of made-up inputs; more are made only where the model's own shapes ask for them.
_MOST_ELEMENTS = 1 << 22

#: Numbers of dimensions that are tried in turn where the model does not tell it.
_RANKS = (2, 3, 4, 1, 0)

#: What outputs show that hold no finite float, and yet something to compare.
_SOMETHING = 0.001

#: An output of at least so many values is flat with fewer different ones than these; more are not looked at.
_MANY, _FEW, _MOST_LOOKED_AT = 64, 16, 1 << 16

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


def made_up(
    reference: Runnable, graph: ir.Model, *, mixed: bool = False, draws: Mapping[str, Draw] | None = None
) -> Feeds | NoFeeds:
    """Feeds that a model returns numbers for, with one sample more where it takes that; or why there are none.

    Args:
        reference: the model.
        graph: its graph, which tells the tables that an input is looked up in.
        mixed: whether zeros and ones at random are to follow integers and truth values that are all ones.
        draws: what makes up values like those of real data, by input: outside of the ranges that a calibration saw,
            an artifact's outputs tell nothing of its use.
    """
    reasons: list[str] = []
    ports, tables, drawn = _ports(reference, graph), table_sizes(graph), draws or {}
    known = tied(ports, graph)
    ways = [known] if known == ports else [known, ports]
    ran = _best(reference, (maker for way in ways for maker in _makers(way, tables, drawn)), reasons)
    if ran is None:
        ran = _best(reference, _axis_by_axis(known, graph, tables, drawn), reasons)
    if ran is None:
        return NoFeeds(
            f"{reasons[0]} {len(reasons)} choices of its free sizes were tried." if reasons[1:] else reasons[0]
        )
    if ran.shows == 0:
        return NoFeeds("it returns no finite number for made-up inputs.")
    return _with_others(reference, ran, mixed=mixed)


def _best(reference: Runnable, makers: Iterable[_Maker], reasons: list[str]) -> _Trial | None:
    """The trial that shows most, of makers in turn; None, and a reason for each, where a model runs on none."""
    ran: _Trial | None = None
    for maker in makers:
        if ran is not None and not maker.is_larger_than(ran.maker):
            continue  # what ran and left an output without a number may fill it at a larger size alone
        try:
            trial = _fullest(reference, maker)
        except InputError as error:
            reasons.append(f"on made-up inputs, {error.message[0].lower()}{error.message[1:]}")
            continue
        if ran is None or trial.shows > ran.shows:
            ran = trial
        if ran.shows == 1:
            break
    return ran


def has_numbers(outputs: Mapping[str, Any]) -> bool:
    """Whether outputs have anything to compare: a finite number, or what is no float; or are empty by their shapes."""
    arrays = [array for value in outputs.values() for array in tensors_of(value)]
    floats = [array for array in arrays if array.size and dtype_family(array.dtype) == "float"]
    return len(floats) < len(arrays) or not arrays or any(_is_finite(array) for array in floats)


def _shown(outputs: Mapping[str, Any]) -> float:
    """Of outputs that are floats, the part that holds a number: what is empty, zero or not finite proves nothing."""
    if not has_numbers(outputs):
        return 0
    arrays = [array for value in outputs.values() for array in tensors_of(value)]
    floats = [array for array in arrays if dtype_family(array.dtype) == "float"]
    if not floats:
        return 1
    # Without any there is still something to compare, such as an integer.
    return max(sum(map(_is_signal, floats)) / len(floats), _SOMETHING)


def is_flat(values: np.ndarray) -> bool:
    """Whether many values are hardly two different ones: where outputs are saturated, no error shows."""
    import numpy as np

    if values.size < _MANY:
        return False
    return np.unique(values.reshape(-1)[:: -(-values.size // _MOST_LOOKED_AT)]).size < _FEW


def _varied(outputs: Mapping[str, Any]) -> float:
    """Of outputs that are floats, the part that is not flat; 1 where there are none."""
    arrays = [array for value in outputs.values() for array in tensors_of(value)]
    floats = [array for array in arrays if dtype_family(array.dtype) == "float"]
    return sum(not is_flat(array) for array in floats) / len(floats) if floats else 1


def _is_finite(values: np.ndarray) -> bool:
    """Whether any of some values is finite."""
    import numpy as np

    return bool(np.isfinite(values.astype(np.float64)).any())


def _is_signal(values: np.ndarray) -> bool:
    """Whether any of some values is finite and not zero."""
    import numpy as np

    wide = values.astype(np.float64)
    return bool((np.isfinite(wide) & (wide != 0)).any())


@dataclass(frozen=True)
class _Maker:
    """Inputs of one size; see `made_up_feeds`."""

    ports: Sequence[Port]
    tables: Mapping[str, int]
    samples: int
    length: int
    side: int
    draws: Mapping[str, Draw]
    axes: Mapping[str, int] = field(default_factory=dict)

    def is_larger_than(self, other: _Maker) -> bool:
        """Whether it makes longer sequences or larger images."""
        return not self.axes and (self.length > other.length or self.side > other.side)

    def feeds(self, *, spread: str, fill: str, more: int = 0) -> Arrays:
        """Inputs of so many samples more."""
        samples = self.samples + more
        return made_up_feeds(
            self.ports, samples, self.length, samples, side=self.side, tables=self.tables, fill=fill, spread=spread,
            draws=self.draws, axes=self.axes,
        )  # fmt: skip


@dataclass(frozen=True)
class _Trial:
    """A maker's inputs that a model ran on.

    ``shows`` is how much of what it returned can be compared, and ``varied`` how much of it is not flat; from 0 to 1.
    """

    maker: _Maker
    make: Callable[..., Arrays]
    fill: str
    feeds: Arrays
    shows: float
    varied: float

    @property
    def grade(self) -> tuple[float, float]:
        """By which trials compare."""
        return self.shows, self.varied


def _fullest(reference: Runnable, maker: _Maker) -> _Trial:
    """The first filling for which a model fills and varies every output, or the one for which it does so most.

    Raises:
        InputError: the model does not run on what the maker makes.
    """
    best: _Trial | None = None
    problem: InputError | None = None
    for fill in FILLS[:-1] if _has_integers(maker.ports) else FILLS[:1]:
        for spread in SPREADS if _has_floats(maker.ports) else SPREADS[:1]:
            make = partial(maker.feeds, spread=spread)
            feeds = make(fill=fill)
            try:
                outputs = reference.run(feeds)
            except InputError as error:
                problem = problem or error
                break  # what the model does not take is a shape, or an integer
            trial = _Trial(maker, make, fill, feeds, _shown(outputs), _varied(outputs))
            if best is None or trial.grade > best.grade:
                best = trial
            if best.grade == (1, 1):
                return best
    if best is None:
        assert problem is not None
        raise problem
    return best


def _ports(reference: Runnable, graph: ir.Model) -> list[Port]:
    """A model's inputs; the runtime tells one of any number of dimensions no otherwise than a scalar."""
    unknown = {value.name for value in graph.graph.inputs if value.shape is None}
    return [replace(port, shape=None) if port.name in unknown else port for port in reference.inputs]


def _makers(ports: Sequence[Port], tables: Mapping[str, int], draws: Mapping[str, Draw]) -> Iterator[_Maker]:
    """Makers of inputs, none of which makes the shapes of an earlier one."""
    seen: list[dict[str, list[int]]] = []
    ranked = [
        [port if port.shape is not None else replace(port, shape=(None,) * rank) for port in ports]
        for rank in (_RANKS if any(port.shape is None for port in ports) else (0,))
    ]
    for known in (*ranked, *map(_with_states, ranked)):
        for samples, length, side in _SIZES:
            shapes = lengths(known, samples, length, side)
            is_small = sum(map(prod, shapes.values())) <= _MOST_ELEMENTS
            if shapes not in seen and (is_small or not seen):
                seen.append(shapes)
                yield _Maker(known, tables, samples, length, side, draws)


def _axis_by_axis(
    ports: Sequence[Port], graph: ir.Model, tables: Mapping[str, int], draws: Mapping[str, Draw]
) -> Iterator[_Maker]:
    """Makers that give each free axis a length of its own: names do not tell what an inner Concat or Add binds."""
    named = named_axes(ports)
    if len(named) < len(ports):
        return
    for asked_for in solved(named, graph):
        yield _Maker(named, tables, *_SIZES[0], draws, asked_for)
    firsts = first_axes(named)
    free = (dim for port in named for dim in port.shape or () if isinstance(dim, str) and dim not in firsts)
    names = list(dict.fromkeys(free))
    if not 1 < len(names) <= _MOST_AXES:
        return
    for chosen in product(_AXIS_LENGTHS, repeat=len(names)):
        if len(set(chosen)) > 1:
            yield _Maker(named, tables, *_SIZES[0], draws, firsts | dict(zip(names, chosen, strict=True)))


def _with_states(ports: Sequence[Port]) -> list[Port]:
    """Inputs of which a recurrent net's states, ``[layers, ?, units]``, have as many samples as the others.

    Only axes without a name are given one.
    """
    batch = counts_samples(ports) or "samples"
    found = []
    for port in ports:
        shape = list(port.shape or ())
        is_state = len(shape) == 3 and isinstance(shape[0], int) and isinstance(shape[2], int)
        axis = 1 if is_state else 0
        if shape and shape[axis] is None:
            shape[axis] = batch
        found.append(replace(port, shape=tuple(shape)))
    return found


def _with_others(reference: Runnable, trial: _Trial, *, mixed: bool) -> Feeds:
    """Feeds that a model runs on, and others that are made likewise as far as it runs on them."""
    maker, make = trial.maker, trial.make
    found = [(trial.feeds, maker.samples)]
    more = make(fill=trial.fill, more=1)
    if _shapes(more) != _shapes(trial.feeds) and _runs(reference, more):
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


def _has_floats(ports: Sequence[Port]) -> bool:
    """Whether any input is of floats."""
    return any(port.dtype.kind not in "iubO" for port in ports)


def _shapes(feeds: Arrays) -> list[list[tuple[int, ...]]]:
    return [[array.shape for array in tensors_of(value)] for value in feeds.values()]


def _runs(reference: Runnable, feeds: Arrays) -> bool:
    try:
        reference.run(feeds)
    except InputError:
        return False
    return True
