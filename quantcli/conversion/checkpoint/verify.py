"""Verification of what was written: reopened from disk, decoded, and compared with what was meant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from quantcli import formats
from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.conversion.checkpoint.writer import LayerResult, others_checksum, scales_checksum, slabs
from quantcli.core.numerics import checksum
from quantcli.core.tensors import TensorInfo, TensorSpec
from quantcli.errors import VerificationError
from quantcli.planning.plan import LayerPlan, Plan


class Verifier:
    """Compares an artifact, read back through the ordinary checkpoint reader, with a plan's results."""

    def __init__(self, artifact: Path, plan: Plan, specs: Mapping[str, TensorSpec]) -> None:
        """Open the artifact. Raises VerificationError where names, dtypes or shapes are not those planned."""
        self.plan = plan
        self.checkpoint: Checkpoint = open_checkpoint(artifact)
        self.infos: dict[str, TensorInfo] = {info.name: info for info in self.checkpoint.infos()}
        stored = {name: TensorSpec(info.dtype, info.shape) for name, info in self.infos.items()}
        if stored != dict(specs):
            wrong = sorted(name for name in stored.keys() | specs.keys() if stored.get(name) != specs.get(name))
            raise VerificationError(f"The artifact's tensors are not those planned; the first is {wrong[0]!r}.")

    def check(self, layer: LayerPlan, result: LayerResult) -> None:
        """Decode one layer and compare. Raises VerificationError where a single code differs."""
        if layer.has_codes:
            self._check_quantized(layer, result)
        else:
            self._check_values(layer, result)

    def _check_values(self, layer: LayerPlan, result: LayerResult) -> None:
        info = self.infos[layer.info.name]
        for (start, stop), meant in zip(slabs(layer), result.checksums, strict=True):
            stored = self.checkpoint.read_rows(info, start, stop)
            self._compare(layer, checksum(stored), meant, f"rows {start} to {stop}")

    def _check_quantized(self, layer: LayerPlan, result: LayerResult) -> None:
        assert layer.scheme is not None
        form = formats.quantized_format(self.plan.format)
        name, columns = layer.info.name, layer.matrix_shape[1]
        info = self.infos[form.codes_name(name, layer.scheme)]
        rows = layer.matrix_shape[0]
        for (start, stop), meant in zip(slabs(layer), result.checksums, strict=True):
            # Stored rows need not be matrix rows (bitsandbytes flattens): offsets tell which they are.
            width = max(1, info.nbytes // max(1, info.rows))
            first = form.codes_offset(start, columns, layer.scheme) // width
            last = info.rows if stop == rows else form.codes_offset(stop, columns, layer.scheme) // width
            codes = form.decode_codes(self.checkpoint.read_rows(info, first, last), columns, layer.scheme)
            self._compare(layer, checksum(codes), meant, f"rows {start} to {stop}")
        others = form.layout(name, layer.matrix_shape, layer.scheme, self.plan.scale_dtype).keys() - {info.name}
        stored = others_checksum({other: self._load(other) for other in others})
        self._compare(layer, stored, result.others_checksum, "what is stored beside the codes")
        scale, zero_point = form.decode_scales(name, layer.matrix_shape, layer.scheme, self._load)
        self._compare(layer, scales_checksum(scale, zero_point), result.scales_checksum, "scales")

    def _load(self, name: str) -> torch.Tensor:
        info = self.infos[name]
        return self.checkpoint.read_rows(info, 0, info.rows)

    @staticmethod
    def _compare(layer: LayerPlan, stored: int, meant: int, where: str) -> None:
        if stored != meant:
            raise VerificationError(
                f"{layer.info.name}, {where}: what was read back is not what was written.",
                hint="The disk may be failing; if it happens again elsewhere, please report it.",
            )
