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


@contextmanager
def heap_set_aside() -> Generator[None]:
    """Keep the garbage collector from going through what lives already, the model and torch itself, while passes run.

    Passes make many small objects, and each full collection over a whole process costs as much as several passes.
    """
    mine = gc.isenabled() and gc.get_freeze_count() == 0
    if mine:
        gc.freeze()
    frozen = gc.get_freeze_count()
    try:
        yield
    finally:
        # More than were frozen here: someone else froze what lives since, to keep it so.
        if mine and gc.get_freeze_count() <= frozen:
            gc.unfreeze()
