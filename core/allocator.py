"""What this process does with memory that tensors no longer need."""

from __future__ import annotations

import ctypes

# Numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
MIB = 1 << 20


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next step instead of handing it back to the kernel; return whether it could be told.

    A step frees all its activations and the next one wants them again. Handed back, every page of them is zeroed and mapped anew:
    with ten inverted labels that took half of the time (docs/adr/0013). The process stays as large as it was at its largest.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Told one at a time, the first would fix the others at their small defaults.
    return all([mallopt(M_MMAP_THRESHOLD, 1024 * MIB), mallopt(M_TRIM_THRESHOLD, 2048 * MIB - 1), mallopt(M_TOP_PAD, 64 * MIB)])
