"""How the threads of OpenMP wait, which run PyTorch's operators and Lissom's kernels (decision 0038)."""

from __future__ import annotations

import ctypes
import os

_POLLS = "10000"
"""Some tenths of a millisecond, longer than the time between two operators. GCC's OpenMP by itself waits 30 times as long."""
_SOFT = 1
"""The number of omp_pause_soft: what OpenMP holds may be made again."""


def shorten_waiting() -> None:
    """Let threads of GCC's OpenMP sleep after they waited awake for a short time, unless the environment says how they wait.

    A thread that waits awake for another keeps its core from that other one, where a process beside them has taken its own.
    Nothing happens where OpenMP is loaded already, which reads the environment once.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = _POLLS


def release_threads() -> None:
    """End the OpenMP threads that work for the calling thread, where torch has such; they are started when they are needed.

    They count among the threads by which OpenMP decides how long a thread waits awake. With more than there are cores it sleeps
    at once, and calls of a thread that serves a model, which another thread loaded, take half as long again.
    """
    import torch

    pause = getattr(ctypes.CDLL(torch._C.__file__), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_SOFT)
