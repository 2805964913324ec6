"""Memory that is free but not given back, and objects that live on and need not be looked at."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Generator
from contextlib import contextmanager


def give_back_memory() -> None:
    """Give pages that hold nothing back to the system, where the C library can; else do nothing.

    Calibration makes many tensors of a few megabytes, which glibc keeps when they are gone: on MiniLM as much as all weights.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


_MUCH = 1 << 26
"""The bytes of weights for which a full collection, some tenths of a second, pays."""


def free_dropped_programs(size: int) -> None:
    """Free programs that nothing refers to any more, where they have many bytes of weights.

    Graphs are cycles, and Python's collector, which goes by the number of objects, would keep several programs.
    """
    if size >= _MUCH:
        gc.collect()


_aside: list[bool] = []
"""Not empty while the heap is set aside. Passes run under the lock of `frontends/isolation.py`, one thread at a time."""


@contextmanager
def heap_set_aside() -> Generator[None]:
    """Keep the garbage collector from going through what lives already, the model and torch itself, while passes run.

    Passes make many small objects, and each full collection over a whole process costs as much as several passes.
    """
    # Counting takes as long as there are frozen objects: only what freezes first asks, where a caller's own are usually none.
    if _aside or not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    gc.freeze()
    _aside.append(True)
    try:
        yield
    finally:
        _aside.clear()
        gc.unfreeze()
