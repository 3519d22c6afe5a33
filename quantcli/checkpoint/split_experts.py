"""A checkpoint whose fused experts are read one by one, each a matrix of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.checkpoint import Checkpoint, CheckpointView
from quantcli.core.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One expert's matrix within a fused tensor: ``expert``, and rows from ``first`` of its (turned) slice."""

    name: str
    expert: int
    first: int
    shape: tuple[int, int]
    turned: bool


class SplitExperts(CheckpointView):
    """A checkpoint seen with some of its tensors in parts; a part is read as it is asked for."""

    def __init__(self, original: Checkpoint, parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """See `original` with its tensors named in ``parts`` as those; each part is what `Part` holds."""
        self._parts: dict[str, tuple[TensorInfo, Part]] = {}
        infos: list[TensorInfo] = []
        for info in original.infos():
            if info.name not in parts:
                infos.append(info)
                continue
            for each in parts[info.name]:
                part = Part(each["name"], each["expert"], each["first"], tuple(each["shape"]), each["turned"])
                nbytes = info.nbytes // info.numel * part.shape[0] * part.shape[1]
                self._parts[part.name] = (info, part)
                infos.append(replace(info, name=part.name, shape=part.shape, nbytes=nbytes))
        super().__init__(original, infos)

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in its own dtype."""
        if info.name not in self._parts:
            return self.original.read_rows(info, start, stop)
        fused, part = self._parts[info.name]
        matrix = self.original.read_rows(fused, part.expert, part.expert + 1).reshape(fused.shape[1:])
        rows = slice(part.first + start, part.first + stop)
        return matrix[:, rows].T.contiguous() if part.turned else matrix[rows].contiguous()
