"""The precision that blocks are run in while they are quantized: bfloat16 products where the processor has them.

Calibration in 16 bits is what the field does, on GPUs; what a product loses in bfloat16 is far below what four-bit
weights cost. Statistics, codes and hidden states between blocks stay in float32. A processor without bfloat16
arithmetic is slower in it, and computes in float32 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch

from quantcli.errors import InputError, UsageError

_DEVICES = ("cpu", "cuda")

_exact: ContextVar[bool] = ContextVar("_exact", default=False)


def require_known_device(device: str) -> None:
    """Raise UsageError for a device that there is no such thing as."""
    if device not in _DEVICES:
        raise UsageError(f"--device {device} is not known.", f"Use {' or '.join(_DEVICES)}.")


def check_device(device: str) -> None:
    """Raise UsageError for a device that there is no such thing as, InputError for one that this machine lacks."""
    require_known_device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device cuda: torch {torch.__version__} sees no such device.", "Leave it out.")


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def products(device: torch.device) -> AbstractContextManager[object]:
    """Meanwhile matrix products take bfloat16 where that is faster, unless `full_precision` is asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device) and not _exact.get())


@contextmanager
def full_precision() -> Iterator[None]:
    """Meanwhile everything is float32."""
    token = _exact.set(True)
    try:
        yield
    finally:
        _exact.reset(token)
