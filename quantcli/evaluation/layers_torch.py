"""Where the error comes from: every layer's output in a candidate against the reference's, on the same input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.roles import module_of
from quantcli.evaluation.metrics import Fidelity
from quantcli.models.hugging_face import run
from quantcli.reporting.report import LayerRow


class LayerComparison:
    """Signal to noise of every layer's output, accumulated over samples.

    A layer sees what the layers before it made of the input, so its figure holds their error too.
    """

    def __init__(self) -> None:
        self._fidelity: dict[str, Fidelity] = {}

    def add(self, reference: nn.Module, candidate: nn.Module, inputs: dict[str, Tensor]) -> None:
        """Run one sample through both models."""
        with captured(reference) as ours:
            run(reference, inputs)
        with captured(candidate) as theirs:
            run(candidate, inputs)
        for name, output in ours.items():
            if name in theirs and output.shape == theirs[name].shape:
                self._fidelity.setdefault(name, Fidelity()).add(output, theirs[name])

    def rows(self, reference: Checkpoint, candidate: Checkpoint) -> list[LayerRow]:
        """One row per layer that was quantized, worst first."""
        before, after = _bytes_by_module(reference), _bytes_by_module(candidate)
        schemes = _schemes(candidate)
        rows = []
        for order, (name, fidelity) in enumerate(self._fidelity.items()):
            stored = _stored_name(name, before)
            if stored is None or before[stored] == after.get(stored):
                continue
            rows.append(
                LayerRow(
                    stored, schemes.get(stored), before[stored], after.get(stored, 0), fidelity.sqnr_db,
                    model=str(candidate.path), details={"order": order},
                )
            )  # fmt: skip
        return sorted(rows, key=lambda row: float("inf") if row.sqnr_db is None else row.sqnr_db)


@contextmanager
def captured(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the output of every layer with weights while the model runs."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output.detach()

        return hook

    with ExitStack() as stack:
        for name, module in _weighted_modules(model).items():
            stack.callback(module.register_forward_hook(keep(name)).remove)
        yield outputs


def _bytes_by_module(checkpoint: Checkpoint) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for info in checkpoint.infos():
        name = info.name.split(".quant_state.")[0]
        module = module_of(name) if not name.endswith((".absmax", ".quant_map")) else module_of(module_of(name))
        module = module.removesuffix(".weight")
        sizes[module] = sizes.get(module, 0) + info.nbytes
    return sizes


def _schemes(checkpoint: Checkpoint) -> dict[str, str]:
    return {module_of(name): layer.scheme for name, layer in checkpoint.manifest.layers.items() if layer.scheme}


def _stored_name(module: str, stored: dict[str, int]) -> str | None:
    """The checkpoint's name for a module: the same, or with a prefix the loading class dropped."""
    if module in stored:
        return module
    return next((name for name in stored if name.endswith(f".{module}")), None)


def _weighted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold a weight of their own and may be quantized: linear, convolution, embedding layers."""
    found = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if (
            isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd))
            or "Linear" in kind
            or kind == "Conv1D"
        ):
            found[name] = module
    return found
