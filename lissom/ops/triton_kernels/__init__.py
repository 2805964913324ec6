"""Triton kernels for CUDA devices. Modules other than this one import Triton, so operators import them at the first call.

Each launcher checks nothing: the operator did. Kernels are written for Triton's interpreter too, where they read CPU tensors.
`python -m tools.triton_targets` compiles them for several generations of devices without one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

NEEDED = (8, 0)
"""The lowest compute capability: the first with tensor cores for int8 and bfloat16 that Triton supports."""


def has_kernels(device: torch.device) -> bool:
    """True for a CUDA device that can run these kernels, where Triton can compile them."""
    return obstacle(device) is None


def obstacle(device: torch.device) -> str | None:
    """The reason a device cannot run these kernels; None if it can.

    Triton builds the launcher of a kernel in C: https://github.com/triton-lang/triton/blob/main/python/triton/runtime/build.py
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return "they need a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return 'Triton is not installed (pip install "lissom[triton]")'
    found = torch.cuda.get_device_capability(device)
    if found < NEEDED:
        needed, has = (f"{major}.{minor}" for major, minor in (NEEDED, found))
        return f"they need compute capability {needed}, and this device has {has}"
    if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang"))):
        return "Triton needs a C compiler, and there is no gcc or clang"
    return None
