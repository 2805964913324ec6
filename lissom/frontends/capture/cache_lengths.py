"""KV caches among a model's arguments: the dimensions that count cached tokens, new tokens, or both together.

For `forward(ids, past, mask)` with ids [batch, tokens], past [(k, v), ...] of [batch, heads, cached, head_dim] each, and mask
[batch, cached + tokens], torch.export has a symbol for every length. They are one for all caches, and the mask's is a sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import sympy
import torch
from torch.utils import _pytree as pytree

Place = tuple[int, int]
"""An input, by its position among the leaves of a call, and a dimension of it."""


@dataclass(frozen=True)
class CacheLengths:
    """The dimensions with the number of cached tokens, of new tokens, and of both.

    Attributes:
        tokens: the number itself.
        cached: the number itself.
    """

    tokens: int
    cached: int
    of_cache: frozenset[Place]
    of_tokens: frozenset[Place]
    of_both: frozenset[Place]

    def traced(self, free: frozenset[Place]) -> dict[Place, int]:
        """Sizes to trace with: two or more, since export specializes 0 and 1; unlike for caches and tokens; sums kept.

        Args:
            free: the dynamic dimensions; others keep their sizes.
        """
        sums_vary = self.of_both <= free
        tokens = max(self.tokens, 2) if sums_vary and self.of_tokens & free else self.tokens
        cached = self.cached
        if sums_vary and self.of_cache & free:
            cached = max(cached, 2) if max(cached, 2) != tokens else 2 * tokens
        sizes = dict.fromkeys(self.of_tokens, tokens) | dict.fromkeys(self.of_cache, cached)
        return sizes | dict.fromkeys(self.of_both, tokens + cached)


def cache_lengths(
    args: Sequence[object], kwargs: Mapping[str, object], names: Mapping[Place, str] = MappingProxyType({})
) -> CacheLengths | None:
    """The lengths in a call whose caches are nested arguments of [batch, heads, cached, head_dim]; None without one.

    Caches of another length than the first, as of an encoder's tokens, are none of them.

    Args:
        names: the caller's, of dimensions; caches with unlike names are not the same.
    """
    caches: list[tuple[int, torch.Tensor]] = []
    others: list[tuple[int, torch.Tensor]] = []
    position = 0
    for argument in (*args, *kwargs.values()):
        leaves = pytree.tree_leaves(argument)
        tensors = [(position + index, leaf) for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        position += len(leaves)
        (caches if not isinstance(argument, torch.Tensor) and _is_cache([leaf for _, leaf in tensors]) else others).extend(
            tensors
        )
    lengths = [leaf.shape[1] for _, leaf in others if leaf.dim() in (2, 3)]
    if not caches or not lengths or 0 in caches[0][1].shape:
        return None
    shape = caches[0][1].shape
    sums = [(dim, size) for dim in (2, 1) for size in lengths if size + shape[dim] in lengths]
    dim, tokens = sums[0] if sums else (2, lengths[0])
    cached = shape[dim]
    alike = [(place, dim) for place, leaf in caches if (leaf.shape[0], leaf.shape[dim]) == (shape[0], cached)]
    name = next((names[place] for place in alike if place in names), None)
    places = [(place, index, size) for place, leaf in others for index, size in enumerate(leaf.shape) if index]
    return CacheLengths(
        tokens,
        cached,
        frozenset(place for place in alike if names.get(place, name) == name),
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


def tie_lengths(inputs: Sequence[object], lengths: CacheLengths | None) -> None:
    """Make all caches equally long, and sums the cached and the new tokens.

    Args:
        inputs: fake, by position.
    """
    if lengths is None:
        return
    tensors = {place: value for place, value in enumerate(inputs) if isinstance(value, torch.Tensor)}
    cached, tokens = (
        [tensors[place].shape[dim] for place, dim in sorted(places)] for places in (lengths.of_cache, lengths.of_tokens)
    )
    for length in cached[1:]:
        tie(length, cached[0])
    for place, dim in sorted(lengths.of_both):
        tie(tensors[place].shape[dim], cached[0] + (tokens[0] if tokens else lengths.tokens))


def tie(length: object, other: object) -> None:
    """Replace the symbol of a length by another length, if they are equal in the example."""
    if isinstance(length, torch.SymInt) and isinstance(other, torch.SymInt) and length.node.hint == other.node.hint:
        symbol, target = length.node.expr, other.node.expr
        if isinstance(symbol, sympy.Symbol) and symbol not in target.free_symbols:
            length.node.shape_env._set_replacement(symbol, target, "the cached tokens")
