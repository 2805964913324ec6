"""The placement of a value across the ranks of a partitioned program: replicated, sharded along a dimension, or partial.

`Placed` uses the vocabulary of `torch.distributed.tensor` (`Replicate`, `Shard(dim)`, `Partial`), and adds how a dimension is
sharded: in a packed projection [q, k, v], q, k and v are sharded separately, each by heads. A sharded dimension is a sequence
of spans, each viewed as [outer, size, inner]; for every index of `outer` a rank holds one block along `size`:

    span [outer, size, inner], parts, every: block = ⌈size / parts⌉, rank r holds block ⌊r / every⌋ mod parts

When parts does not divide size, weights are padded with zeros, which contribute nothing to sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import sympy
import torch

from lissom.compiler.ir.types import Size, fixed, substitute

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement


POSITIONS = -2
"""The site of a span of token positions, along which no weight is sharded."""


@dataclass(frozen=True)
class Span:
    """A section of a dimension, viewed as [outer, size, inner] and sharded along `size` into `parts` blocks.

    Attributes:
        parts: 1 when every rank holds all of it; else the number of ranks, or fewer when several ranks hold the same block.
        every: how many neighbouring ranks hold the same block; more than 1 for key/value groups that several ranks read.
        site: the index of the plan's site that is sharded, for messages; not compared.
    """

    outer: Size
    size: Size
    inner: Size
    parts: int
    every: int = 1
    site: int = field(default=-1, compare=False)

    @property
    def block(self) -> Size:
        """The length of a rank's block along `size`."""
        if isinstance(self.size, int):
            return -(-self.size // self.parts)
        return (self.size + self.parts - 1) // self.parts

    @property
    def whole(self) -> Size:
        """The length of the span."""
        return self.outer * self.size * self.inner

    @property
    def local(self) -> Size:
        """The length of the span on one rank."""
        return self.outer * self.block * self.inner

    @property
    def is_padded(self) -> bool:
        """True when the blocks together are longer than `size`."""
        return self.block * self.parts != self.size

    def shaped(self, outer: Size, size: Size, inner: Size) -> Span:
        """The span with other sizes and the same blocks."""
        return replace(self, outer=outer, size=size, inner=inner)

    def indices(self, rank: int, start: int = 0) -> torch.Tensor:
        """The indices of the dimension that a rank holds of this span, [local]; -1 for padding. Sizes must be integers."""
        outer, size, inner, block = (fixed(extent) for extent in (self.outer, self.size, self.inner, self.block))
        first = rank // self.every % self.parts * block
        rows = torch.arange(first, first + block)
        rows = torch.where(rows < size, rows, -1)
        places = (
            start + (torch.arange(outer)[:, None] * size + rows[None, :].clamp_min(0))[..., None] * inner + torch.arange(inner)
        )
        return torch.where(rows[None, :, None] < 0, -1, places).flatten()


Spans = tuple[Span, ...]


@dataclass(frozen=True)
class Placed:
    """The placement of a value across the ranks.

    Attributes:
        dims: the sharded dimensions, in order, each with its spans; more than one when key/value groups and the heads in a
            group are separate dimensions.
        partial: whether the value is the sum of the ranks' tensors.
    """

    dims: tuple[tuple[int, Spans], ...] = ()
    partial: bool = False

    @property
    def is_sharded(self) -> bool:
        return bool(self.dims)

    @property
    def is_replicated(self) -> bool:
        return not self.dims and not self.partial

    @property
    def is_by_position(self) -> bool:
        """True when each rank holds the tokens at its own positions."""
        return len(self.dims) == 1 and self.dims[0][1][0].site == POSITIONS

    def spans(self, dim: int) -> Spans:
        """The spans of a dimension; empty when it is not sharded."""
        return next((spans for index, spans in self.dims if index == dim), ())

    @property
    def placements(self) -> tuple[Placement, ...]:
        """The placement in torch's classes: a `Shard` for each sharded dimension, or one `Partial` or `Replicate`."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        if self.partial:
            return (Partial(),)
        return tuple(Shard(dim) for dim, _ in self.dims) or (Replicate(),)

    def __str__(self) -> str:
        if self.partial:
            return "Partial"
        return " ".join(f"Shard({dim})" for dim, _ in self.dims) or "Replicate"


def single(placed: Placed | tuple[Placed, ...]) -> Placed:
    """The placement of a value that is one tensor."""
    assert isinstance(placed, Placed), "the value is several tensors"
    return placed


REPLICATED = Placed()
PARTIAL = Placed(partial=True)


def sharded(*dims: tuple[int, Spans]) -> Placed:
    """The placement of a value sharded along these dimensions; dimensions that every rank holds in full are left out."""
    split = [(dim, spans) for dim, spans in dims if any(span.parts > 1 for span in spans)]
    return Placed(tuple(sorted(split, key=lambda entry: entry[0])))


def local_size(spans: Spans, size: Size) -> Size:
    """The size of a dimension on a rank."""
    return sum((span.local for span in spans), start=0) if spans else size


def is_padded(placed: Placed) -> bool:
    """True when a rank may hold padding."""
    return any(span.is_padded for _, spans in placed.dims for span in spans)


def can_gather(placed: Placed, world_size: int) -> bool:
    """True when the concatenated blocks of all ranks are the value: one span, one block per rank."""
    if len(placed.dims) != 1:
        return False
    spans = placed.dims[0][1]
    return len(spans) == 1 and spans[0].outer == 1 and spans[0].parts == world_size


def indices_of(spans: Spans, rank: int) -> torch.Tensor:
    """The indices of a dimension that a rank holds, in its order, [local]; -1 for padding. Sizes must be integers."""
    indices, start = list[torch.Tensor](), 0
    for span in spans:
        indices.append(span.indices(rank, start))
        start += fixed(span.whole)
    return torch.cat(indices)


def local_part(weight: torch.Tensor, placed: Placed, rank: int, padding: int = 0) -> torch.Tensor:
    """A rank's shard of a weight: a view when its indices are contiguous, else a copy, filled up with `padding`.

    Rank 0 holds all of a partial weight, and the others hold zeros.
    """
    if placed.partial:
        return weight if rank == 0 else torch.zeros_like(weight)
    for dim, spans in placed.dims:
        weight = _take(weight, dim, indices_of(spans, rank), padding)
    return weight


def _take(weight: torch.Tensor, dim: int, indices: torch.Tensor, padding: int) -> torch.Tensor:
    first = int(indices[0])
    if first >= 0 and torch.equal(indices, torch.arange(first, first + len(indices))):
        return weight.narrow(dim, first, len(indices))
    # fp8 values are selected and zeroed as bytes.
    stored = weight.view(torch.uint8) if weight.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu) else weight
    indices = indices.to(weight.device)
    selected = stored.index_select(dim, indices.clamp_min(0))
    missing = (indices < 0).nonzero().flatten()
    return (selected.index_fill(dim, missing, padding) if len(missing) else selected).view(weight.dtype)


def whole_of(parts: Sequence[torch.Tensor], placed: Placed) -> torch.Tensor:
    """The full value, from the parts that the ranks hold. Sizes must be integers."""
    if placed.partial:
        return torch.stack([*parts]).sum(0)
    if not placed.dims:
        return parts[0]
    sizes = [sum(fixed(span.whole) for span in placed.spans(dim)) or size for dim, size in enumerate(parts[0].shape)]
    whole = parts[0].new_zeros(sizes)
    for rank, part in enumerate(parts):
        places = [torch.arange(size) for size in sizes]
        kept = part
        for dim, spans in placed.dims:
            indices = indices_of(spans, rank)
            kept = kept.index_select(dim, (indices >= 0).nonzero().flatten())
            places[dim] = indices[indices >= 0]
        whole[torch.meshgrid(*places, indexing="ij")] = kept
    return whole


def at_sizes(placed: Placed, value_of: dict[sympy.Symbol, int]) -> Placed:
    """The placement with the symbols replaced by the sizes of a call."""

    def settle(size: Size) -> Size:
        return int(substitute(size, value_of)) if isinstance(size, sympy.Basic) else size

    return Placed(
        tuple(
            (dim, tuple(s.shaped(settle(s.outer), settle(s.size), settle(s.inner)) for s in spans))
            for dim, spans in placed.dims
        ),
        placed.partial,
    )
