"""How this process uses memory while it trains."""

from __future__ import annotations

import ctypes
import os
import sys

# mallopt(3): keep freed memory, and take large arrays from the heap, where they are used again.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_SHARE = 0.5


def keep_freed_memory() -> bool:
    """Tell glibc not to give freed arrays back; whether it was told.

    A training step frees and asks again for the same arrays. Given back to the system, each is
    cleared page by page when it is touched again, which can cost more than the arithmetic.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(_MMAP_MAX, 0))


def fits_in_memory(num_bytes: int) -> bool:
    """Whether half of this machine's memory holds so many bytes."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return num_bytes < 2**33
    return num_bytes < _SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
