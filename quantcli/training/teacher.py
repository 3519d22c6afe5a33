"""The original model as a teacher: it runs once for a sample, while there is room for what it returned."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quantcli.training.objective import Batch, Outputs

#: Outputs that are kept, in bytes; where there are more of them, the model runs anew in every step.
_KEPT_BYTES = 256 << 20


class Teacher:
    """Outputs of the original model, kept sample by sample. ``is_full``: none can be added any more."""

    def __init__(self, model: Callable[[Mapping[str, Tensor]], Outputs]) -> None:
        self._model = model
        self._kept: dict[tuple[int, str], Outputs] = {}
        self._nbytes, self.is_full = 0, False

    def __call__(self, batch: Batch) -> Outputs:
        """Outputs for a batch, by name, without gradients."""
        # Of a sequence that is padded otherwise the outputs have another shape.
        shapes = str([tuple(values.shape[1:]) for values in batch.inputs.values()])
        keys = [(number, shapes) for number in batch.numbers]
        kept = [self._kept[key] for key in keys if key in self._kept]
        if len(kept) == len(keys):
            return {name: torch.stack([outputs[name] for outputs in kept]) for name in kept[0]}
        with torch.no_grad():
            outputs = {name: values.detach() for name, values in self._model(batch.inputs).items()}
        if all(values.ndim and len(values) == len(batch) for values in outputs.values()):
            for row, key in enumerate(keys):
                self._keep(key, {name: values[row].clone() for name, values in outputs.items()})
        else:
            self.is_full = True
        return outputs

    def _keep(self, key: tuple[int, str], outputs: Outputs) -> None:
        nbytes = sum(values.nbytes for values in outputs.values())
        self.is_full = self.is_full or self._nbytes + nbytes > _KEPT_BYTES
        if key not in self._kept and not self.is_full:
            self._kept[key] = outputs
            self._nbytes += nbytes
