"""The plug-ins: what each kind must offer, and three tables from name to module.

A plug-in is a module with the functions of its Protocol. It is imported when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from quantcli.errors import UsageError
from quantcli.scheme import NumberFormat, QuantizedTensor, Scheme, Storage, TensorInfo, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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

FORMATS = {
    "compressed-tensors": "quantcli.formats.compressed_tensors",
    "gptq": "quantcli.formats.gptq",
    "awq": "quantcli.formats.awq",
    "bitsandbytes": "quantcli.formats.bitsandbytes",
    "safetensors": "quantcli.formats.safetensors",
}


class Algorithm(Protocol):
    """What can be known of any algorithm. ``NEEDS`` names what it wants of the calibration data; empty: nothing."""

    NEEDS: frozenset[str]

    def supports(self, number_format: NumberFormat) -> str | None:
        """Why the algorithm cannot serve a number format, or None."""


class Rounding(Algorithm, Protocol):
    """Chooses the codes of one weight, or of any number of its rows, without data."""

    def run(self, weight: Tensor, number_format: NumberFormat, scale_dtype: torch.dtype) -> QuantizedTensor:
        """Quantize float32 ``[rows, columns]``."""


class Format(Protocol):
    """Says what it can carry; the formats that only cast need no more than this."""

    NAME: str

    def supports(self, scheme: Scheme) -> str | None:
        """Why a scheme cannot be written, or None."""

    def carries(self, role: str) -> str | None:
        """Why layers of a role stay as they are, or None."""


class CodedFormat(Format, Protocol):
    """Lays out codes slab by slab (where it stores them by rows), and everything else of a layer at once."""

    STORAGE: Storage

    def fits(self, shape: tuple[int, ...], scheme: Scheme) -> str | None:
        """Why a matrix of this shape cannot be laid out, or None."""

    def together(self, schemes: Iterable[Scheme]) -> str | None:
        """Why these schemes cannot stand in one model, or None."""

    def codes_name(self, weight: str, scheme: Scheme) -> str:
        """Name of the tensor that holds the codes."""

    def layout(self, weight: str, shape: tuple[int, ...], scheme: Scheme, scale_dtype: str) -> dict[str, TensorSpec]:
        """Every tensor that stands for a weight."""

    def encode_codes(self, codes: Tensor, scheme: Scheme) -> Tensor:
        """Stored form of a slab of rows."""

    def codes_offset(self, row: int, columns: int, scheme: Scheme) -> int:
        """Bytes of the stored codes that lie before a row."""

    def decode_codes(self, stored: Tensor, columns: int, scheme: Scheme) -> Tensor:
        """Inverse of `encode_codes`."""

    def encode_scales(
        self, weight: str, tensor: QuantizedTensor, scheme: Scheme, scale_dtype: str
    ) -> dict[str, Tensor]:
        """Every tensor but the codes."""

    def decode_scales(
        self, weight: str, shape: tuple[int, ...], scheme: Scheme, load: Callable[[str], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point."""

    def config(self, schemes: Mapping[str, Scheme], left: Iterable[str], dtype: str) -> dict[str, Any]:
        """``quantization_config`` for config.json."""

    def find(
        self, infos: Mapping[str, TensorInfo], section: Mapping[str, Any], load: Callable[[str], Tensor]
    ) -> dict[str, tuple[tuple[int, int], Scheme]]:
        """Shape and scheme of every coded weight of a checkpoint, by the weight's name."""


def _lookup(table: Mapping[str, str], kind: str, name: str) -> Any:
    if name not in table:
        raise UsageError(f"Unknown {kind} {name!r}.", suggestion(name, table))
    return import_module(table[name])


def algorithm(name: str) -> Algorithm:
    """The algorithm of this name. Raises UsageError for an unknown one."""
    return cast(Algorithm, _lookup(ALGORITHMS, "algorithm", name))


def rounding(name: str) -> Rounding:
    """The algorithm of this name, which must be one that needs no data."""
    return cast(Rounding, _lookup(ALGORITHMS, "algorithm", name))


def output_format(name: str) -> Format:
    """The format of this name. Raises UsageError for an unknown one."""
    return cast(Format, _lookup(FORMATS, "format", name))


def coded_format(name: str) -> CodedFormat:
    """The format of this name, which must be one that holds codes."""
    return cast(CodedFormat, _lookup(FORMATS, "format", name))


def suggestion(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known word, or lists them all."""
    near = get_close_matches(name, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
