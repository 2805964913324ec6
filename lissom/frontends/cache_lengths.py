"""KV caches among a model's arguments: the inputs whose sizes are the cached tokens, the new tokens, or both together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

Place = tuple[int, int]
"""An input, by its position among the leaves of a call, and a dimension of it."""


@dataclass(frozen=True)
class CacheLengths:
    """The dimensions with the number of cached tokens, of new tokens, and of both; tokens, cached: the numbers themselves."""

    tokens: int
    cached: int
    of_cache: frozenset[Place]
    of_tokens: frozenset[Place]
    of_both: frozenset[Place]

    def traced(self, free: frozenset[Place]) -> dict[Place, int]:
        """Sizes to trace with: two or more, since export specializes 0 and 1; unlike for caches and tokens; sums kept."""
        may_grow = lambda places: bool(places & free) and self.of_both <= free  # noqa: E731
        tokens = max(self.tokens, 2) if may_grow(self.of_tokens) else self.tokens
        cached = max(self.cached, 2) if may_grow(self.of_cache) else self.cached
        if cached == tokens and may_grow(self.of_cache):
            cached *= 2
        sizes = dict.fromkeys(self.of_tokens, tokens) | dict.fromkeys(self.of_cache, cached)
        return sizes | dict.fromkeys(self.of_both, tokens + cached)


def cache_lengths(args: Sequence[object], kwargs: Mapping[str, object]) -> CacheLengths | None:
    """The lengths in a call whose caches are nested arguments of [batch, heads, cached, head_dim]; None without one."""
    caches: list[tuple[int, torch.Tensor]] = []
    others: list[tuple[int, torch.Tensor]] = []
    position = 0
    for item in (*args, *kwargs.values()):
        leaves = pytree.tree_leaves(item)
        tensors = [(position + index, leaf) for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        position += len(leaves)
        (caches if not isinstance(item, torch.Tensor) and _is_cache([leaf for _, leaf in tensors]) else others).extend(tensors)
    lengths = [leaf.shape[1] for _, leaf in others if leaf.dim() in (2, 3)]
    if not caches or not lengths:
        return None
    shape = caches[0][1].shape
    sums = [(dim, size) for dim in (2, 1) for size in lengths if size + shape[dim] in lengths]
    dim, tokens = sums[0] if sums else (2, lengths[0])
    cached = shape[dim]
    places = [(place, index, size) for place, leaf in others for index, size in enumerate(leaf.shape) if index]
    return CacheLengths(
        tokens,
        cached,
        frozenset((place, dim) for place, _ in caches),
        frozenset((place, index) for place, index, size in places if size == tokens and _is_length(others, place, index)),
        frozenset((place, index) for place, index, size in places if size == tokens + cached),
    )


def _is_length(others: Sequence[tuple[int, torch.Tensor]], place: int, index: int) -> bool:
    """Dimension 1 of token inputs, and the last but one of masks over pairs of tokens."""
    rank = dict(others)[place].dim()
    return index == 1 if rank in (2, 3) else index == rank - 2


def _is_cache(tensors: Sequence[torch.Tensor]) -> bool:
    shapes = {tensor.shape[:3] for tensor in tensors}
    return len(tensors) > 1 and len(shapes) == 1 and all(each.dim() == 4 and each.is_floating_point() for each in tensors)
