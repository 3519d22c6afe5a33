"""Algorithms: each chooses the codes of a weight. One file each, listed in `quantcli.formats.base`."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from quantcli.algorithms.base import Algorithm, AlgorithmOptions, NoOptions, Rounding
from quantcli.core.scheme import NumberFormat, Scheme
from quantcli.system.text import lookup

if TYPE_CHECKING:
    pass

ALGORITHMS = {
    "rtn": "quantcli.algorithms.rtn",
    "mse": "quantcli.algorithms.mse",
    "gptq": "quantcli.algorithms.gptq",
    "awq": "quantcli.algorithms.awq",
    "smoothquant": "quantcli.algorithms.smoothquant",
    "autoround": "quantcli.algorithms.autoround",
    "tune": "quantcli.algorithms.tune",
    "qat": "quantcli.algorithms.qat",
}


def algorithm(name: str) -> Algorithm:
    """The algorithm of this name. Raises UsageError for an unknown one."""
    return cast(Algorithm, lookup(ALGORITHMS, "algorithm", name))


def rounding(name: str) -> Rounding:
    """The algorithm of this name, which must be one that needs no data."""
    return cast(Rounding, lookup(ALGORITHMS, "algorithm", name))


def options_of(name: str) -> type[AlgorithmOptions]:
    """What an algorithm can be told. Raises UsageError for an unknown one."""
    options: type[AlgorithmOptions] = getattr(algorithm(name), "Options", NoOptions)
    return options


def recommended(scheme: Scheme) -> list[str]:
    """The chain for a scheme with calibration data, as measured by tests/benchmarks/benchmark_algorithms.py."""
    if scheme.inputs is not None:
        return ["smoothquant"]
    return ["gptq"] if scheme.weights.dtype in ("int4", "int8") else []


def default_rounding(number_format: NumberFormat) -> str:
    """What chooses codes without data."""
    return "mse" if number_format.dtype == "int4" else "rtn"
