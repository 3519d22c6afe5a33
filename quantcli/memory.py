"""What this process has taken of the machine's memory."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its figure starts at the size of the process that started this one.
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if peak:
            return int(peak[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def release_freed() -> None:
    """Give the system back what was freed.

    The C library of Linux keeps freed blocks of up to 32 MB for itself, and what lies between them counts as this
    process's own; other systems need no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
