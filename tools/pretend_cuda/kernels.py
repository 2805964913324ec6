"""What kernels a GPU has, and what they ask of their operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from lissom.ops import block_sparse_attention, int4_product, int8_product, quantize_rows

aten = torch.ops.aten
OWN = ("aten", "prim", "prims", "profiler")
"""The namespaces of operators that PyTorch has for CUDA, unless they are named below."""
_CPU_ONLY = ("mkldnn", "onednn", "mkl", "quantized", "_for_cpu", "xnnpack", "fbgemm")
"""Parts of the names of operators that there are for the CPU alone."""
_KEYS = ("CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd")


def require_kernel(func: torch._ops.OpOverload, args: Sequence[Any]) -> None:
    """Raise what PyTorch raises where an operator has no kernel for CUDA, or not for these operands."""
    name = func.name()
    missing = func.namespace not in OWN and not any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in _KEYS)
    if missing or any(part in name for part in _CPU_ONLY):
        raise NotImplementedError(f"Could not run '{name}' with arguments from the 'CUDA' backend.")
    if func is aten._int_mm.default:
        _require_int_mm(*args)


def _require_int_mm(left: torch.Tensor, right: torch.Tensor) -> None:
    """The sizes that `_int_mm` takes on CUDA: aten/src/ATen/native/cuda/Blas.cpp."""
    rows, inner = left.shape
    outputs = right.shape[1]
    if rows <= 16:
        raise RuntimeError(f"self.size(0) needs to be greater than 16, but got {rows}")
    if inner == 0 or inner % 8:
        raise RuntimeError(f"self.size(1) needs to be greater than 0 and a multiple of 8, but got {inner}")
    if outputs == 0 or outputs % 8:
        raise RuntimeError(f"mat2.size(1) needs to be greater than 0 and a multiple of 8, but got {outputs}")


def _convert_weight_to_int4pack(weight: torch.Tensor, together: int) -> torch.Tensor:
    """Nibbles [features, inputs / 2] in the size that CUDA gives them, in another order.

    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/cuda/int4mm.cu
    """
    features, bytes_ = weight.shape
    if weight.dtype != torch.uint8 or together not in (2, 4, 8):
        raise RuntimeError("_convert_weight_to_int4pack takes bytes, and 2, 4 or 8 tiles together")
    if features % 8 or 2 * bytes_ % (16 * together):
        raise RuntimeError(f"_convert_weight_to_int4pack: [{features}, {2 * bytes_}] is no multiple of [8, {16 * together}]")
    return weight.contiguous().view(torch.int32).reshape(features // 8, 2 * bytes_ // (16 * together), 32, together // 2)


def _weight_int4pack_mm(x: torch.Tensor, packed: torch.Tensor, group: int, grid: torch.Tensor) -> torch.Tensor:
    """x [rows, inputs] by the weight (q - 8) · scale + offset; grid is [inputs / group, features, 2]."""
    if x.dtype != torch.bfloat16 or grid.dtype != torch.bfloat16 or group not in (32, 64, 128, 256):
        raise RuntimeError(f"_weight_int4pack_mm takes bfloat16 and groups of 32 to 256, not {x.dtype}, {grid.dtype}, {group}")
    features, inputs = 8 * packed.shape[0], x.shape[1]
    both = packed.reshape(features, -1).view(torch.uint8)
    q = torch.stack((both >> 4, both & 15), -1).reshape(features, inputs)
    steps, offsets = (part.t().float().repeat_interleave(group, 1) for part in grid.unbind(-1))
    return (x.float() @ ((q - 8.0) * steps + offsets).t()).bfloat16()


def _sparse_semi_structured_addmm(
    bias: torch.Tensor | None, values: torch.Tensor, places: torch.Tensor, dense: torch.Tensor
) -> torch.Tensor:
    """A 2:4 weight by [inputs, rows], which PyTorch runs by CUTLASS on compute capability 8.x alone; rounded once.

    https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/sparse/cuda/SparseSemiStructuredOps.cu
    """
    if torch.cuda.get_device_capability()[0] != 8:
        raise RuntimeError("_sparse_semi_structured_mm: Supported only on GPUs with compute capability 8.x")
    if dense.shape[1] % 8:
        raise RuntimeError(f"_sparse_semi_structured_mm: {dense.shape[1]} columns are no multiple of 8")
    product = sparse_semi_structured_to_dense_cutlass(values, places).float() @ dense.float()
    return (product if bias is None else product + bias.float()[:, None]).to(dense.dtype)


def _histc(values: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
    """Of integers too."""
    return torch.histc(values.float(), *arguments, **named).to(values.dtype)


def _softmax(x: torch.Tensor, dim: int, wide: bool) -> torch.Tensor:
    """Of float16 in float32 too, in one kernel, which the CPU lacks."""
    return torch.softmax(x, dim, dtype=torch.float32 if wide else None)


REFERENCES: dict[object, Callable[..., object]] = {
    aten._convert_weight_to_int4pack.default: _convert_weight_to_int4pack,
    aten._weight_int4pack_mm.default: _weight_int4pack_mm,
    aten._sparse_semi_structured_mm.default: partial(_sparse_semi_structured_addmm, None),
    aten._sparse_semi_structured_addmm.default: _sparse_semi_structured_addmm,
    aten.histc.default: _histc,
    aten._softmax.default: _softmax,
    **{own: own for own in (block_sparse_attention, int4_product, int8_product, quantize_rows)},
}
"""What computes operators that only a GPU has. Those of Lissom are kernels there that Triton compiles."""
