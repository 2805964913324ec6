"""`lissom::block_sparse_attention` by PyTorch's FlexAttention, whose compiled kernel reads visible blocks only.

The operator's implementation on CUDA devices. Dong et al. 2024, FlexAttention, arXiv 2412.05496. `Pattern.blocks` gives the
visible blocks; those that are not fully visible are masked token by token inside the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import cast

import torch
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, flex_attention

from lissom.ops.blocked_attention import block_sparse_attention_reference
from lissom.ops.library import LIBRARY
from lissom.ops.pattern import Condition, Pattern

BLOCK = 128
"""Tokens per block: what FlexAttention's kernels are tuned for, and a multiple of each of their tiles."""
_SMALLEST = 16
"""The smallest head_dim; Triton multiplies no narrower matrices."""
_MASKS = 64
"""The cache size for block masks; the least recently used is dropped."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Index = torch.Tensor
Seen = Callable[[Index, Index, Index, Index], torch.Tensor]
Flex = Callable[..., object]


@torch.no_grad()
def flex_block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    layout: torch.Tensor | None = None,
    *,
    pattern: Sequence[int],
    block: int,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    compiled: bool = True,
) -> torch.Tensor:
    """The operator on CUDA.

    Args:
        compiled: False materializes all scores, for tests; on a CPU sinks need that.
    """
    if q.dtype not in _DTYPES:
        return block_sparse_attention_reference(
            q, k, v, bias, layout, pattern=pattern, block=block, scale=scale, softcap=softcap, sinks=sinks
        )
    width = v.shape[-1]
    q, k, v = (_at_least(operand, _SMALLEST) for operand in (q, k, v))
    mask = block_mask(Pattern.decode(pattern, block), q.shape[2], k.shape[2], q.device, layout)
    call = _compiled() if compiled else cast(Flex, flex_attention)
    options: dict[str, object] = {
        "score_mod": _scores(bias if bias is None else bias.expand(*q.shape[:3], k.shape[2]), softcap),
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if sinks is None:
        output = cast(torch.Tensor, call(q, k, v, **options))
    else:
        # A sink is one more logit: softmax with it is softmax without it, times e^lse / (e^lse + e^sink).
        aux = AuxRequest(lse=True)
        output, statistics = cast("tuple[torch.Tensor, AuxOutput]", call(q, k, v, return_aux=aux, **options))
        share = torch.sigmoid(cast(torch.Tensor, statistics.lse).unsqueeze(-1) - sinks.float())
        output = (output * share).to(v.dtype)
    return output[..., :width].transpose(1, 2).contiguous().transpose(1, 2)


def _at_least(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Features padded with zeros, which change neither scores nor the other values."""
    missing = size - tensor.shape[-1]
    return tensor if missing <= 0 else torch.nn.functional.pad(tensor, (0, missing))


@cache
def _compiled() -> Flex:
    # Each pattern, length and shape of bias compiles its own kernel; by default PyTorch stops at the eighth.
    compile_function = cast(Callable[..., Flex], torch.compile)  # whose overloads do not name these options yet
    return compile_function(flex_attention, dynamic=False, recompile_limit=1 << 16, isolate_recompiles=True)


def _scores(bias: torch.Tensor | None, softcap: float) -> Callable[..., torch.Tensor] | None:
    """The score modification. It applies boolean masks too, since fully visible blocks of the pattern are not masked."""
    if bias is None and not softcap:
        return None

    def change(score: torch.Tensor, b: Index, h: Index, i: Index, j: Index) -> torch.Tensor:
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if bias is None:
            return score
        value = bias[b, h, i, j]
        return torch.where(value, score, -float("inf")) if bias.dtype == torch.bool else score + value

    return change


def seen_by(pattern: Pattern, layout: torch.Tensor | None) -> Seen:
    """The pattern as FlexAttention's mask function: whether key j is visible to query i in head h."""

    def holds(condition: Condition, h: Index, i: Index, j: Index) -> torch.Tensor:
        if condition.asks_layout:
            assert layout is not None
            row, column = (
                torch.clamp(index // pattern.block, max=size - 1) for index, size in zip((i, j), layout.shape[1:], strict=True)
            )
            return layout[h if len(layout) > 1 else 0, row, column]
        return condition.holds(i, j)

    def seen(b: Index, h: Index, i: Index, j: Index) -> torch.Tensor:
        visible = i < 0
        for conditions in pattern.alternatives:
            both = i >= 0
            for condition in conditions:
                both = both & holds(condition, h, i, j)
            visible = visible | both
        return visible

    return seen


def block_mask(
    pattern: Pattern, queries: int, keys: int, device: torch.device, layout: torch.Tensor | None = None
) -> BlockMask:
    """The visible blocks of a pattern, cached for calls with the same layout.

    Building it reads the layout on the host. A layout without a version counter is read by every call.

    Raises:
        ValueError: when the pattern reads a layout and there is none.
    """
    if layout is not None and layout.is_inference():
        return _block_mask(pattern, queries, keys, device, layout)
    return _known_block_mask(pattern, queries, keys, device, layout, None if layout is None else layout._version)


@lru_cache(_MASKS)  # by the identity of the layout, which it keeps alive
def _known_block_mask(
    pattern: Pattern, queries: int, keys: int, device: torch.device, layout: torch.Tensor | None, version: int | None
) -> BlockMask:
    return _block_mask(pattern, queries, keys, device, layout)


def _block_mask(pattern: Pattern, queries: int, keys: int, device: torch.device, layout: torch.Tensor | None) -> BlockMask:
    some, whole = pattern.blocks(queries, keys, BLOCK, layout)
    # A last block that is not full is masked token by token.
    if keys % BLOCK:
        whole[..., -1] = False
    partial = _listed(some & ~whole, device)
    return BlockMask.from_kv_blocks(
        *partial,
        *_listed(whole, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen_by(pattern, layout if layout is None else layout.to(device)),
        seq_lengths=(queries, keys),
        compute_q_blocks=False,  # which only gradients need
    )


def _listed(blocks: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of blocks per row, and their indices first: [1, heads, rows] and [1, heads, rows, columns]."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    count, places = (tensor.to(torch.int32)[None].contiguous().to(device) for tensor in (blocks.sum(-1), order))
    return count, places


LIBRARY.impl("block_sparse_attention", flex_block_sparse_attention, "CUDA")
