"""`inspect`: what a model is made of and what a scheme would do to it, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.checkpoint.decoded import DecodedFloats, decoded_checkpoint
from quantcli.checkpoint.quantized import open_floats_of
from quantcli.checkpoint.roles import classify, original_dtype, quantization_of
from quantcli.core.dtypes import NUMBER_OF_DTYPE
from quantcli.errors import InputError
from quantcli.formats.gguf import NAME as GGUF
from quantcli.onnx.graph.model import is_onnx
from quantcli.reporting.report import LayerRow, ModelRow, Report, bytes_by, planned_for
from quantcli.system.user_functions import is_function


def inspect(model: str | Path, schemes: Sequence[str] = ()) -> Report:
    """Describe a model without reading a weight; what is code is loaded.

    Args:
        model: a folder, a safetensors file or index, a torch state dict, an ONNX file, a ``.pt2`` or
            ``package.module:function``.
        schemes: presets to plan for; the report then has one layer row per tensor and scheme.

    Raises:
        InputError: the model is missing or damaged.
        UsageError: an unknown scheme.
    """
    if is_onnx(Path(model)):
        from quantcli.commands.inspect_onnx import inspect_onnx

        return inspect_onnx(Path(model), schemes)
    if is_function(str(model)) or Path(model).suffix == ".pt2":
        from quantcli.commands.inspect_program import inspect_program

        return inspect_program(str(model), schemes)
    checkpoint = open_checkpoint(Path(model))
    infos = checkpoint.infos()
    manifest = checkpoint.manifest
    quantized = quantization_of(infos, checkpoint.config)
    floats = open_floats_of(checkpoint) if quantized else None
    dtype = original_dtype(infos)
    roles = classify(infos, checkpoint.config)
    details: dict[str, Any] = {
        "architecture": ((checkpoint.config or {}).get("architectures") or [None])[0],
        "tensors": len(infos),
        "files": len(checkpoint.files),
        "parameters": sum(info.numel for info in infos if info.is_float) if not quantized else None,
        "dtypes": bytes_by([(info.dtype, info.nbytes) for info in infos]),
        "roles": bytes_by([(roles[info.name], info.nbytes) for info in infos]) if not quantized else {},
        "quantized_layers": manifest.layer_schemes(),
    }
    row = ModelRow(
        str(checkpoint.path),
        "reference",
        manifest.format or quantized or ("torch" if checkpoint.files[0].suffix != ".safetensors" else "safetensors"),
        manifest.scheme or (floats.scheme if floats else None if quantized else NUMBER_OF_DTYPE.get(dtype, dtype)),
        None,
        checkpoint.size_bytes,
        details=details,
    )
    row.manifest = manifest.to_json() if manifest.quantcli else None
    report = Report("inspect", [row], warnings=list(checkpoint.warnings))
    if not schemes:
        report.layers = [
            LayerRow(
                info.name, None, info.nbytes, info.nbytes,
                details={"shape": list(info.shape), "dtype": info.dtype, "role": roles[info.name]},
            )
            for info in infos
        ]  # fmt: skip
        return report
    source = DecodedFloats(floats) if floats else checkpoint
    if quantized == GGUF:
        source = decoded_checkpoint(checkpoint)
    report.details["schemes"] = [_plan(source, scheme, report) for scheme in schemes]
    return report


def _plan(checkpoint: Checkpoint, scheme: str, report: Report) -> dict[str, Any]:
    """What `convert` would do: sizes, and which tensors are left and why. Adds layer rows to the report."""
    from quantcli.conversion.checkpoint.rows import plan_rows
    from quantcli.planning.recipe import FLAGS, validate

    try:
        plan, layout, rows = plan_rows(checkpoint, validate({"scheme": scheme}, FLAGS))
    except InputError as error:
        # That one scheme does not apply is what the user wants to know, not a failure to inspect.
        report.warnings.append(f"{scheme}: {error}")
        return {"scheme": scheme, "applies": False, "reason": str(error)}
    report.layers += planned_for(scheme, rows)
    report.warnings += [f"{scheme}: {warning}" for warning in plan.warnings]
    left = Counter(layer.role for layer in plan.layers if layer.scheme is None)
    return {
        "scheme": scheme,
        "applies": True,
        "format": plan.format,
        "size_bytes": layout.nbytes,
        "size_ratio": layout.nbytes / checkpoint.size_bytes,
        "quantized_tensors": len(plan.quantized),
        "left": dict(left.most_common()),
    }
