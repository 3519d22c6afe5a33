"""`inspect` for functions and programs of torch.export: their weights, and what the graph that they become would be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quantcli.commands.inspect_onnx import plan_schemes
from quantcli.core.dtypes import DTYPE_OF_TORCH_NAME
from quantcli.core.tensors import TensorInfo
from quantcli.models.source import open_model
from quantcli.onnx.graph.model import open_onnx
from quantcli.reporting.report import LayerRow, Report, bytes_by
from quantcli.system.files import temporary_folder

if TYPE_CHECKING:
    from torch import nn


def inspect_program(model: str, schemes: Sequence[str] = ()) -> Report:
    """Describe a model that is code; it is loaded, and for ``schemes`` exported to ONNX.

    Raises:
        InputError: the model is missing or damaged, or for schemes cannot be exported.
        UsageError: an unknown scheme.
    """
    source = open_model(model)
    runner = source.runner()
    module = cast("nn.Module", runner.module)  # type: ignore[attr-defined]
    infos = _infos(module, Path(model))
    details: dict[str, Any] = {
        "architecture": "program of torch.export" if source.kind == "program" else type(module).__name__,
        "tensors": len(infos),
        "files": 1 if source.kind == "program" else 0,
        "parameters": sum(info.numel for info in infos if info.is_float),
        "dtypes": bytes_by([(info.dtype, info.nbytes) for info in infos]),
        "roles": {},
        "quantized_layers": {},
        "inputs": [str(port) for port in runner.inputs],
    }
    row = source.row(0, {})
    row.sha256, row.details = None, details
    report = Report("inspect", [row])
    if not schemes:
        report.layers = [
            LayerRow(
                info.name, None, info.nbytes, info.nbytes,
                details={"shape": list(info.shape), "dtype": info.dtype, "role": "parameter"},
            )
            for info in infos
        ]  # fmt: skip
        return report
    from quantcli.export.export import export_to_onnx

    with temporary_folder() as folder:
        exported = export_to_onnx(model, Path(folder))
        graph = open_onnx(exported.path)
        graph.shown = Path(model)
        report.warnings += exported.warnings
        plan_schemes(graph, schemes, report)
    return report


def _infos(module: nn.Module, file: Path) -> list[TensorInfo]:
    return [
        TensorInfo(
            name,
            tuple(tensor.shape),
            DTYPE_OF_TORCH_NAME.get(dtype := str(tensor.dtype).removeprefix("torch."), dtype),
            tensor.nbytes,
            file,
        )
        for name, tensor in module.state_dict().items()
    ]
