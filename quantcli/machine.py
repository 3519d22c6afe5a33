"""What figures were measured on: the processor and what it can do."""

from __future__ import annotations

import platform
from pathlib import Path

#: Instructions that integer kernels are chosen by, as Linux names them.
_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")

_CPU_INFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The processor's name, as well as the system knows it."""
    return _field("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Vector and integer instructions of the processor; empty where the system does not list them."""
    known = (_field("flags") or _field("Features") or "").split()
    return [name for name in _FEATURES if name in known]


def _field(name: str) -> str | None:
    if not _CPU_INFO.is_file():
        return None
    for line in _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
