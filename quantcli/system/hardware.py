"""The machine's processor and memory, and what this process takes of it."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from pathlib import Path

#: Instructions that integer kernels are chosen by, as Linux names them.
_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")

#: What Linux tells; other systems have no such files.
_CPU_INFO, _STATUS = Path("/proc/cpuinfo"), Path("/proc/self/status")


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


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    if _STATUS.exists():
        # Not getrusage: on Linux its figure starts at the size of the process that started this one.
        peak = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="utf-8"))
        if peak:
            return int(peak[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def resident_bytes() -> int:
    """Resident size of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def is_running(process: int) -> bool:
    """Whether there is a process of this number; signal 0, which asks so elsewhere, ends it on Windows."""
    import psutil

    return bool(psutil.pid_exists(process))


def free_memory_bytes() -> int:
    """Memory that can be taken without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def release_freed() -> None:
    """Give the system back what was freed.

    The C library of Linux keeps freed blocks of up to 32 MB for itself, and what lies between them counts as this
    process's own; other systems need no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
