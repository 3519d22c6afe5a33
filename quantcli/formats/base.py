"""What a format must offer: a module with the functions of one of these protocols."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from quantcli.core.dtypes import torch_dtype
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
        """Shape and scheme of every quantized weight of a checkpoint, by the weight's name."""


@dataclass(frozen=True)
class Storage:
    """What a format fixes for every weight that it holds.

    ``scale_dtype``: safetensors' name of the dtype of scales; None: that of the model. ``by_rows``: the codes of a row
    lie together, so that a weight can be written row by row. ``lowest_zero_point``: a zero point may be the lowest
    code. ``input_zero_points``: fixed ranges of inputs may be asymmetric. ``one_dtype``: weights that are not quantized
    are multiplied in the dtype that they are stored in. ``wide_vectors``: norms and biases are float32 whatever the
    rest is. ``coarse_scales``: beside a zero point, scales are such as `NumberFormat.coarse` says. ``starts_anew``:
    what is stored so is often all that there is of a model, so that its values may be quantized anew.
    ``channel_group``: columns that share a scale where a preset has one per channel, which the format's kernels do not
    have.
    """

    scale_dtype: str | None = None
    by_rows: bool = True
    lowest_zero_point: bool = True
    input_zero_points: bool = True
    one_dtype: bool = False
    wide_vectors: bool = False
    coarse_scales: bool = False
    starts_anew: bool = False
    channel_group: int | None = None


class Checked:
    """A quantized format whose results are held against what it said of them.

    The arithmetic of a layout may be wrong for one shape in a thousand; the bytes would then land in the wrong place.
    """

    def __init__(self, form: Any) -> None:
        self._form = form

    def __getattr__(self, name: str) -> Any:
        return getattr(self._form, name)

    def encode_codes(self, codes: Tensor, scheme: Scheme) -> Tensor:
        """Stored form of a slab of rows, as many bytes as the format said that they take."""
        stored: Tensor = self._form.encode_codes(codes, scheme)
        rows, columns = codes.shape
        # An odd number of four-bit codes ends in half a byte.
        missing = stored.nbytes - self._form.codes_offset(rows, columns, scheme)
        assert codes.element_size() == 1 and missing in (0, 1), f"{rows} x {columns} codes take {stored.nbytes} bytes"
        return stored

    def decode_codes(self, stored: Tensor, columns: int, scheme: Scheme) -> Tensor:
        """Inverse of `encode_codes`: int8 ``[rows, columns]``."""
        codes: Tensor = self._form.decode_codes(stored, columns, scheme)
        assert codes.element_size() == 1 and codes.ndim == 2 and codes.shape[1] == columns, f"codes {codes.shape}"
        return codes

    def encode_scales(
        self, weight: str, tensor: QuantizedTensor, scheme: Scheme, scale_dtype: str
    ) -> dict[str, Tensor]:
        """Every tensor but the codes, each of the dtype and shape of the layout."""
        parts: dict[str, Tensor] = self._form.encode_scales(weight, tensor, scheme, scale_dtype)
        specs = self._form.layout(weight, tensor.shape, scheme, scale_dtype)
        for name, part in parts.items():
            spec = specs[name]
            assert part.dtype == torch_dtype(spec.dtype), f"{name} is {part.dtype}, not {spec.dtype}"
            assert tuple(part.shape) == tuple(spec.shape), f"{name} is {tuple(part.shape)}, not {spec.shape}"
        return parts

    def decode_scales(
        self, weight: str, shape: tuple[int, ...], scheme: Scheme, load: Callable[[str], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Scale in float32, and a zero point for each where the scheme has them."""
        scale, zero_point = self._form.decode_scales(weight, shape, scheme, load)
        assert scale.element_size() == 4 and (zero_point is None) == scheme.weights.symmetric
        assert zero_point is None or zero_point.shape == scale.shape, f"zero points {zero_point.shape}"
        return scale, zero_point
