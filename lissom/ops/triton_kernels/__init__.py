"""Triton kernels for CUDA devices. Modules other than this one import Triton, so operators import them at the first call.

Each launcher checks nothing: the operator did. Kernels are written for Triton's interpreter too, where they read CPU tensors.
`python -m tools.triton_targets` compiles them for several generations of devices without one.
"""

from __future__ import annotations

import importlib.util

import torch

NEEDED = (8, 0)
"""The lowest compute capability: the first with tensor cores for int8 and bfloat16 that Triton supports."""


def has_kernels(device: torch.device) -> bool:
    """True for a CUDA device that can run these kernels, where Triton is installed."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= NEEDED
