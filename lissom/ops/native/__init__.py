"""C++ kernels of the custom operators: built once for this processor, cached, and loaded on first use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from lissom.ops.native.build import kept_library

Result = TypeVar("Result")

SWITCH = "LISSOM_NATIVE"
"""Set this environment variable to 0 to disable the kernels."""


@cache
def load_kernels() -> str | None:
    """Load the kernels, and build them if they are not cached; returns why there are none, None if they are loaded.

    Raises:
        UnsupportedError: when `LISSOM_NATIVE_ISA` names an instruction set that this processor lacks.
    """
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH}=0 switches the C++ kernels off"
    if sys.platform != "linux":
        return f"the C++ kernels are built on Linux only, and this is {sys.platform}"
    try:
        torch.ops.load_library(str(kept_library()))
    except (OSError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def describe_kernels() -> str:
    """The loaded kernels in words: their instruction set, and how they multiply bfloat16; or why there are none."""
    missing = load_kernels()
    if missing is not None:
        return f"none: {missing}"
    dots, amx = torch.ops.lissom.dots_bfloat16(), torch.ops.lissom.use_amx()
    how = "by tiles, few rows " if amx else ""
    how += "by the processor's own instruction" if dots else "in float32"
    return refused_tiles() or f"{torch.ops.lissom.instruction_set()}; bfloat16 is multiplied {how}"


def refused_tiles() -> str | None:
    """A note for the report where the processor has AMX and the operating system refuses it; None elsewhere."""
    if load_kernels() or torch.ops.lissom.instruction_set() != "amx" or torch.ops.lissom.use_amx():
        return None
    return "the operating system does not permit AMX, so the kernels use AVX-512"


def instructions_for(dtype: torch.dtype) -> str:
    """The instruction set by which the loaded kernels multiply a dtype: `avx512_bf16`; `amx` for bfloat16 and int8 alone."""
    name = torch.ops.lissom.instruction_set()
    if name != "amx":
        return name
    if dtype not in (torch.bfloat16, torch.int8):
        return "avx512_bf16"
    return name if torch.ops.lissom.use_amx() else "avx512_bf16, as the operating system refuses AMX"


def multiplies_bfloat16() -> bool:
    """True when linear layers in bfloat16 are multiplied in bfloat16; False when their numbers are widened to float32."""
    return torch.ops.lissom.use_amx() or torch.ops.lissom.dots_bfloat16()


def kernel_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes of the loaded kernels; none where there are no kernels."""
    return () if load_kernels() else (torch.float32, torch.bfloat16)


def missing_kernel(dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason there is no kernel for a dtype on a device, in words for the history; None if there is one."""
    if device.type != "cpu":
        return f"it runs on {device.type}"
    missing = load_kernels()
    if missing is None and dtype not in kernel_dtypes():
        return f"there is no kernel for {dtype} on this machine"
    return missing


def missing_int8_kernel(dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason there is no kernel for int8 linear layers with activations of that dtype; None if there is one."""
    lacking = "this processor lacks AVX2, which the int8 kernel needs"
    return missing_kernel(dtype, device) or (None if torch.ops.lissom.has_int8() else lacking)


def missing_weight_quantized_kernel(dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason there is no kernel for weight-only int8 and int4 linear layers with activations of that dtype, or None."""
    lacking = "this processor lacks AVX2, which the weight-only kernel needs"
    return missing_kernel(dtype, device) or (None if torch.ops.lissom.has_weight_quantized() else lacking)


def reads_few_bits_faster() -> bool:
    """True if the kernels read weights of five and six bits faster than those of eight: with AVX-512, but not with AVX2."""
    return not load_kernels() and torch.ops.lissom.instruction_set().startswith(("avx512", "amx"))


def one_call(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function with a caching allocator for large outputs of kernels; each thread keeps 64 MB at most between calls."""
    begin, end = torch.ops.lissom.begin_call.default, torch.ops.lissom.end_call.default

    def call(*args: object) -> Result:
        begin()
        try:
            return function(*args)
        finally:
            end()

    return call
