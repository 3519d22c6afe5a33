"""What `convert` refuses before it opens the model: wishes that are not known, or that would do nothing."""

from __future__ import annotations

from pathlib import Path

from quantcli.errors import UsageError
from quantcli.system.files import check_name, require_utf8


def require_known(verify: str | None, device: str) -> None:
    """Raise UsageError for a way to verify, or a device, that does not exist, whether it is needed or not."""
    if verify not in (None, "codes", "run"):
        raise UsageError(f"--verify {verify} is not known.", "Use codes or run.")
    if device != "cpu":
        from quantcli.system.devices import require_known_device

        require_known_device(device)


def require_effect(output: Path, *, onnx: bool, verify: str | None, calibration: str | Path | None) -> None:
    """Raise UsageError for what does nothing where this is converted, and for an output named as what it is not."""
    if onnx:
        check_name(output, ".onnx", folder=True)
        require_utf8(output)
        if verify == "codes":
            raise UsageError("--verify codes is for checkpoints; what becomes ONNX is always run.")
        return
    if calibration:
        raise UsageError(
            "Statistics of `calibrate` are for ONNX: a checkpoint's layers are calibrated one block after the other.",
            hint="Give the data itself with --data, or use --format onnx.",
        )
