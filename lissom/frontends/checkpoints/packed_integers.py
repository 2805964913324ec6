"""Integers that checkpoints pack into words of 32 bits, their scales, and the orders of GPTQ and AWQ.

A word holds 32 / bits integers, from its lowest bits to its highest:

    GPTQ                 qweight [in · bits / 32, out], qzeros [groups, out · bits / 32], scales [groups, out], g_idx [in]
    AWQ                  qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out], in the order 0 2 4 6 1 3 5 7
    compressed-tensors   weight_packed [out, in · bits / 32], weight_zero_point [out · bits / 32, groups]

GPTQ stores zero points minus one, as AutoGPTQ did, unless its format is `gptq_v2`; one is added to the words, as GPTQModel does
(`convert_gptq_v1_to_v2_format_module`, github.com/ModelCloud/GPTQModel). AWQ: `reverse_awq_order`,
github.com/casper-hansen/AutoAWQ. compressed-tensors: `unpack_from_int32`, which holds q + 2^(bits - 1),
github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

import torch

from lissom.compiler.paging import empty_values, release
from lissom.ops.gguf_blocks import StoredBlocks

WORD = 32
"""Bits of a word."""
_ONES = {4: 0x11111111, 8: 0x01010101}
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ each of eight columns is."""
_AT_ONCE = 1 << 20
"""The values that are dequantized at once."""


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The integers of words, [rows, words] of int32 to [rows, words · 32 / bits] of uint8.

    Args:
        bits: 4 or 8.
    """
    data = words.contiguous().view(torch.uint8)
    return data if bits == 8 else torch.stack((data & 15, data >> 4), -1).flatten(1)


def gptq_zero_points(words: torch.Tensor, bits: int, *, less_one: bool) -> torch.Tensor:
    """The zero points of GPTQ, [groups, words] to [out, groups] of uint8.

    Args:
        less_one: whether they are stored minus one.
    """
    return unpack_words(words + _ONES[bits] if less_one else words, bits).T.contiguous()


def awq_integers(words: torch.Tensor) -> torch.Tensor:
    """The weight or zero points of AWQ, [in or groups, words] to [out, in or groups] of uint8."""
    return unpack_words(words, 4).unflatten(1, (-1, 8))[..., _AWQ_ORDER].flatten(1).T.contiguous()


def as_stored(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int) -> StoredBlocks:
    """Unsigned integers with their scales and zero points in the form of `lissom::dequantize`.

    Where all zero points are the middle of the range, the integers become signed ones without zero points.

    Args:
        q: [rows, columns], uint8.
        scale: [rows, groups].
        zero_point: [rows, groups], uint8; None for the middle everywhere.
    """
    middle = 1 << (bits - 1)
    if zero_point is None or bool((zero_point == middle).all()):
        return StoredBlocks((q ^ 128).view(torch.int8) if bits == 8 else q.view(torch.int8) - 8, scale, None, f"int{bits}")
    return StoredBlocks(q, scale, zero_point, f"uint{bits}")


def exact_scale(scale: torch.Tensor) -> torch.Tensor:
    """The scales in a dtype that kernels read: bfloat16 becomes float16 where this holds all values, else float32."""
    if scale.dtype in (torch.float16, torch.float32):
        return scale.contiguous()
    half, whole = scale.half(), scale.float()
    return half.contiguous() if torch.equal(half.float(), whole) else whole.contiguous()


def column_order(group_of: torch.Tensor, groups: int) -> torch.Tensor | None:
    """The columns sorted by their groups; None where the groups are not equally large.

    Args:
        group_of: [columns], the group of each column.
    """
    counts = torch.bincount(group_of.long(), minlength=groups)
    return torch.argsort(group_of, stable=True) if bool((counts == counts[0]).all()) else None


def values_of(stored: StoredBlocks, order: torch.Tensor | None) -> torch.Tensor:
    """The weight in float32, on the disk if it is large.

    Args:
        order: the weight's column at each stored column.
    """
    values = empty_values(stored.q.shape)
    step = max(1, _AT_ONCE // max(1, stored.q.shape[1]))
    back = None if order is None else torch.argsort(order)
    for start in range(0, len(values), step):
        rows = stored.dequantize(slice(start, start + step))
        part = values[start : start + step]
        part.copy_(rows if back is None else rows[:, back])
        release(part)
    return values


def in_float32(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a file in float32, on the disk if it is large and of another dtype."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float32:
        return tensor
    values = empty_values(tensor.shape)
    for part, stored in zip(values.view(-1).split(_AT_ONCE), tensor.reshape(-1).split(_AT_ONCE), strict=True):
        part.copy_(stored)
        release(part)
    return values
