"""The plug-ins: what each kind must offer, and three tables from name to module.

A plug-in is a module with the functions of its Protocol. It is imported when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from quantcli.core.scheme import Scheme
from quantcli.core.tensors import QuantizedTensor, TensorInfo, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class Format(Protocol):
    """Says what it can carry; the formats that only cast need no more than this."""

    NAME: str

    def supports(self, scheme: Scheme) -> str | None:
        """Why a scheme cannot be written, or None."""

    def carries(self, role: str) -> str | None:
        """Why layers of a role stay as they are, or None."""


class QuantizedFormat(Format, Protocol):
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


@dataclass(frozen=True)
class Storage:
    """What a format fixes for every weight that it holds.

    ``scale_dtype``: safetensors' name of the dtype of scales; None: that of the model. ``by_rows``: the codes of a row
    lie together, so that a weight can be written row by row. ``lowest_zero_point``: a zero point may be the lowest
    code. ``input_zero_points``: fixed ranges of inputs may be asymmetric.
    """

    scale_dtype: str | None = None
    by_rows: bool = True
    lowest_zero_point: bool = True
    input_zero_points: bool = True
