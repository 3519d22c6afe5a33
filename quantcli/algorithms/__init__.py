"""Algorithms: one file each, and one entry here, which tells all that must be known before a file is imported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

from quantcli.algorithms.base import Algorithm, AlgorithmOptions, CalibratedRounding, NoOptions, Rounding, Transform
from quantcli.core import plugins
from quantcli.core.scheme import NumberFormat, Scheme

#: What an algorithm does, and so what its module offers (see `quantcli.algorithms.base`). ``rounding`` chooses codes
#: by the weight alone, ``calibrated rounding`` by calibration data, ``transform`` moves difficulty between layers
#: before that, and ``training`` learns after it.
Kind = Literal["transform", "rounding", "calibrated rounding", "training"]


#: Where an artifact is made again to the byte.
EVERYWHERE, SAME_PROCESSOR = "everywhere", "on the same processor with as many threads"
#: Ranges of activations, which are taken from data.
RANGES = "ranges"


@dataclass(frozen=True)
class Entry(plugins.Entry):
    """An algorithm in the table.

    ``onnx``: whether it works on ONNX graphs. What is taken where the user leaves the choice: ``default_for`` names
    dtypes of weights that are rounded without data (any other is rounded to nearest), ``recommended_for`` those that
    are rounded with data; "inputs" stands for any scheme that quantizes inputs.
    """

    kinds: tuple[Kind, ...]
    onnx: bool = False
    default_for: tuple[str, ...] = ()
    recommended_for: tuple[str, ...] = ()

    @property
    def is_rounding(self) -> bool:
        """Whether it chooses codes."""
        return "rounding" in self.kinds or "calibrated rounding" in self.kinds


ALGORITHMS: dict[str, Entry] = {
    "rtn": Entry(
        "quantcli.algorithms.rtn", "round to nearest", ("rounding",), onnx=True
    ),
    "mse": Entry(
        "quantcli.algorithms.mse", "clip each group's range to the least error", ("rounding",), onnx=True,
        default_for=("int4",),
    ),
    "gptq": Entry(
        "quantcli.algorithms.gptq", "later columns make up for the errors of earlier ones", ("calibrated rounding",),
        onnx=True, recommended_for=("int4", "int8", "nf4"),
    ),
    "smoothquant": Entry(
        "quantcli.algorithms.smoothquant", "move outliers of inputs into the weights", ("transform",),
        recommended_for=("inputs",),
    ),
    "awq": Entry(
        "quantcli.algorithms.awq", "scale up the columns that large inputs meet, and clip",
        ("transform", "calibrated rounding"),
    ),
    "autoround": Entry(
        "quantcli.algorithms.autoround", "learn block by block which way each weight is rounded",
        ("calibrated rounding",),
    ),
    "tune": Entry("quantcli.algorithms.tune", "learn the scales afterwards, codes as they are", ("training",)),
    "qat": Entry("quantcli.algorithms.qat", "train the quantized model, weights and scales", ("training",), onnx=True),
}  # fmt: skip


def algorithm(name: str) -> Algorithm:
    """The algorithm of this name. Raises UsageError for an unknown one."""
    return cast(Algorithm, plugins.load(ALGORITHMS, "algorithm", name))


def rounding(name: str) -> Rounding:
    """The algorithm of this name, which must be of the kind "rounding"."""
    return cast(Rounding, algorithm(name))


def calibrated_rounding(name: str) -> CalibratedRounding:
    """The algorithm of this name, which must be of the kind "calibrated rounding"."""
    return cast(CalibratedRounding, algorithm(name))


def transform(name: str) -> Transform:
    """The algorithm of this name, which must be of the kind "transform"."""
    return cast(Transform, algorithm(name))


def named(*kinds: Kind) -> list[str]:
    """Names of the algorithms of some kinds, in the order of the table."""
    return [name for name, entry in ALGORITHMS.items() if set(kinds) & set(entry.kinds)]


def needs_no_data(name: str | None) -> bool:
    """Whether an algorithm looks at weights alone; None, which stands for none, does."""
    return name is None or "rounding" in ALGORITHMS[name].kinds


def where_reproducible(names: Iterable[str]) -> dict[str, str]:
    """By algorithm (and `RANGES`): where it gives the same bytes again.

    What looks at data adds up products, which processors and numbers of threads round differently.
    """
    own = [name for name in dict.fromkeys(names) if name == RANGES or name in ALGORITHMS]
    return {name: EVERYWHERE if name != RANGES and needs_no_data(name) else SAME_PROCESSOR for name in own}


def options_of(name: str) -> type[AlgorithmOptions]:
    """What an algorithm can be told. Raises UsageError for an unknown one."""
    options: type[AlgorithmOptions] = getattr(algorithm(name), "Options", NoOptions)
    return options


def recommended(scheme: Scheme) -> list[str]:
    """The chain for a scheme with calibration data, as measured by tests/benchmarks/benchmark_algorithms.py."""
    what = scheme.weights.dtype if scheme.inputs is None else "inputs"
    return [name for name, entry in ALGORITHMS.items() if what in entry.recommended_for]


def default_rounding(number_format: NumberFormat) -> str:
    """What chooses codes without data."""
    return next((name for name, entry in ALGORITHMS.items() if number_format.dtype in entry.default_for), "rtn")
