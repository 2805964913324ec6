"""Memory that is free but not given back."""

from __future__ import annotations

import ctypes
import sys


def give_back_memory() -> None:
    """Give pages that hold nothing back to the system, where the C library can; else do nothing.

    Calibration makes many tensors of a few megabytes, which glibc keeps when they are gone: on MiniLM as much as all weights.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
