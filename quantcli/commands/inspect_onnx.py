"""`inspect` for ONNX: operators, weights, what is quantized already, and what each scheme would cover."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantcli.errors import InputError
from quantcli.onnx.graph.model import OnnxModel, open_onnx
from quantcli.onnx.plan.plan import LayerOutcome, graph_quantization, tensor_info, weighted_nodes
from quantcli.onnx.plan.resolve import resolve_graph
from quantcli.reporting.report import LayerRow, ModelRow, Report, bytes_by, planned_for


def inspect_onnx(path: Path, schemes: Sequence[str] = ()) -> Report:
    """Describe an ONNX model; weights in external data are not read.

    Raises:
        InputError: the model is missing or damaged.
        UsageError: an unknown scheme.
    """
    model = open_onnx(path)
    graph = model.ir.graph
    manifest = model.manifest
    infos = [tensor_info(v, model.path) for v in graph.initializers.values() if v.const_value is not None]
    roles = {weight.value.name: node.op_type for node, weight in weighted_nodes(model.ir)}
    quantized = graph_quantization(model.ir)
    details: dict[str, Any] = {
        "architecture": f"ONNX graph, operator set {model.opset}",
        "tensors": len(infos),
        "files": len(model.files),
        "parameters": None if quantized else sum(info.numel for info in infos if info.is_float),
        "dtypes": bytes_by([(info.dtype, info.nbytes) for info in infos]),
        "roles": {},
        "quantized_layers": manifest.layer_schemes(),
        "operators": dict(Counter(node.op_type for node in graph.all_nodes()).most_common()),
        "inputs": [str(port) for port in model.inputs],
        "outputs": [str(port) for port in model.outputs],
        "quantization": quantized,
    }
    row = ModelRow(
        str(path), "reference", "onnx", manifest.scheme or quantized, None, model.size_bytes, details=details
    )
    row.manifest = manifest.to_json() if manifest.quantcli else None
    report = Report("inspect", [row])
    if quantized and roles:
        report.warnings.append(
            f"The model is quantized in part ({quantized}): {len(roles)} of its weights are in floating point, and "
            "convert would quantize those alone."
        )
    if not schemes:
        report.layers = [
            LayerRow(
                info.name, None, info.nbytes, info.nbytes,
                details={"shape": list(info.shape), "dtype": info.dtype, "role": roles.get(info.name, "constant")},
            )
            for info in infos
        ]  # fmt: skip
        return report
    plan_schemes(model, schemes, report)
    return report


def plan_schemes(model: OnnxModel, schemes: Sequence[str], report: Report) -> None:
    """Add to a report what `convert` would do to a graph with each scheme. Raises UsageError for an unknown one."""
    report.details["schemes"] = [_plan(model, scheme, report) for scheme in schemes]


def _plan(model: OnnxModel, scheme: str, report: Report) -> dict[str, Any]:
    """What `convert` would do, in sizes that are estimates; adds layer rows to the report."""
    from quantcli.conversion.onnx.rows import layer_rows, left_rows
    from quantcli.onnx.graph.prepare import prepare
    from quantcli.planning.recipe import FLAGS, validate

    graph = prepare(model)
    try:
        plan = resolve_graph(validate({"scheme": scheme}, FLAGS), graph, model.shown)
    except InputError as error:
        report.warnings.append(f"{scheme}: {error}")
        return {"scheme": scheme, "applies": False, "reason": str(error)}
    outcomes = [LayerOutcome(node, node.estimated_bytes) for node in plan.nodes]
    report.layers += planned_for(scheme, layer_rows(outcomes) + left_rows(graph, plan, model.shown))
    report.warnings += [f"{scheme}: {warning}" for warning in plan.warnings]
    size = model.size_bytes - plan.saved_bytes
    left = Counter(node.node.op_type for node in plan.of_mode("float"))
    return {
        "scheme": scheme,
        "applies": True,
        "format": "onnx",
        "size_bytes": size,
        "size_ratio": size / model.size_bytes,
        "quantized_tensors": len(plan.nodes) - left.total(),
        "left": dict(left.most_common()),
    }
