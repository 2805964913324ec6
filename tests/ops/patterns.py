"""Patterns of every kind, and what an attention under one is given."""

from __future__ import annotations

import torch

from lissom.ops.pattern import LAYOUT, Condition, Pattern

CAUSAL = Condition(-1, 1, high=0)
PATTERNS = {
    "causal window": Pattern(((Condition(-1, 1, -20, 0),),)),
    "window": Pattern(((Condition(-1, 1, -40, 40),),)),
    "dilated": Pattern(((Condition(-1, 1, -90, 0), Condition(1, -1, 0, 0, 1, 3)),)),
    "strided": Pattern(((Condition(-1, 1, -15, 0),), (CAUSAL, Condition(0, 1, 0, 0, 16, 4)))),
    "blocks": Pattern(((Condition(-1, 1, 0, 0, 48),),)),
    "layout": Pattern(((LAYOUT,),), 32),
    "causal layout": Pattern(((LAYOUT, CAUSAL),), 64),
    "layout and window": Pattern(((LAYOUT, CAUSAL), (Condition(-1, 1, -5, 5),)), 24),
    "global": Pattern(((Condition(0, 1, high=3),), (Condition(1, 0, high=2),), (Condition(-1, 1, -9, 9),), (LAYOUT,)), 16),
    "everything": Pattern(((Condition(0, 1),),)),
    "nothing": Pattern(()),
    "many": Pattern(tuple((Condition(1, 0, n, n, 8), Condition(0, 1, 7 * n % 30, 7 * n % 30 + 2, 8)) for n in range(300))),
}
MASKS = ["none", "padding", "bias", "low bias", "hidden bias", "seen"]


def numbers(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal, the same for the same sizes and seed."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed + sum(sizes))).to(dtype)


def layout_of(pattern: Pattern, heads: int, queries: int, keys: int, seed: int = 0) -> torch.Tensor | None:
    """A third of the blocks at random, where the pattern asks."""
    if not any(condition.asks_layout for conditions in pattern.alternatives for condition in conditions):
        return None
    rows, columns = (-(-length // pattern.block) for length in (queries, keys))
    return torch.rand(heads, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.34


def mask_of(kind: str, batch: int, heads: int, queries: int, keys: int) -> torch.Tensor | None:
    """What is given besides the pattern."""
    if kind == "none":
        return None
    if kind == "bias":
        return numbers(1, heads, queries, keys)
    if kind == "seen":
        return numbers(batch, 1, queries, keys) > 0
    seen = torch.arange(keys) < torch.tensor([max(1, keys - 40 * b - 3) for b in range(batch)])[:, None, None, None]
    if kind == "padding":
        return seen
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf if kind == "hidden bias" else torch.finfo(torch.float32).min)


def projected(batch: int, heads: tuple[int, int], tokens: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype):
    """q, k and v laid out as projections leave them, [batch, tokens, heads, head_dim], transposed."""
    (count, key_count), (queries, keys), (head_dim, value_dim) = heads, tokens, sizes
    shapes = [(queries, count, head_dim), (keys, key_count, head_dim), (keys, key_count, value_dim)]
    return [numbers(batch, *shape, dtype=dtype, seed=seed).transpose(1, 2) for seed, shape in enumerate(shapes)]


def slots_and_rows(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Operands of `unpadded_attention` as `pack-tokens` makes them. seen: tokens that are no padding, [batch, tokens]."""
    slots = seen.flatten().cumsum(0).sub(1).clamp_min(0).unflatten(0, seen.shape)
    return slots, seen.flatten().nonzero().squeeze(1)
