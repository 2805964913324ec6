"""Where the parts of a value are when several ranks share a program: whole on each, sharded along a dimension, or summed up.

`Placed` says it in the vocabulary of `torch.distributed.tensor` (`Replicate`, `Shard(dim)`, `Partial`), and of a dimension
that is sharded also how: a packed projection [q, k, v] is sharded in three places, heads between their rows. Such a dimension
is a row of spans, each seen as [outer, size, inner]; of every `outer` a rank holds one block along `size`:

    span [outer, size, inner], parts, every: block = ⌈size / parts⌉, rank r holds block ⌊r / every⌋ mod parts

Where parts does not divide size, what is missing is zero in weights, and contributes nothing wherever it is summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import sympy
import torch

from lissom.compiler.ir.types import Size

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement


POSITIONS = -2
"""The site of a stretch of positions, which no weight is sharded along."""


@dataclass(frozen=True)
class Span:
    """A stretch of a dimension, seen as [outer, size, inner] and sharded along `size` into `parts` blocks.

    parts: 1 where every rank has all of it; the number of ranks, or fewer where several ranks hold the same block.
    every: how many neighbouring ranks hold the same block; more than 1 for key/value groups that several ranks read.
    site: the number of what is sharded in the plan, so that an obstacle can name it; not compared.
    """

    outer: Size
    size: Size
    inner: Size
    parts: int
    every: int = 1
    site: int = field(default=-1, compare=False)

    @property
    def block(self) -> Size:
        """How much of `size` a rank holds."""
        if isinstance(self.size, int):
            return -(-self.size // self.parts)
        return (self.size + self.parts - 1) // self.parts

    @property
    def whole(self) -> Size:
        """The length of the stretch."""
        return self.outer * self.size * self.inner

    @property
    def local(self) -> Size:
        """Its length on a rank."""
        return self.outer * self.block * self.inner

    @property
    def is_padded(self) -> bool:
        """True when the blocks are longer together than what they hold."""
        return self.block * self.parts != self.size

    def shaped(self, outer: Size, size: Size, inner: Size) -> Span:
        """The same blocks of a dimension of another form."""
        return replace(self, outer=outer, size=size, inner=inner)

    def indices(self, rank: int, start: int = 0) -> torch.Tensor:
        """Which indices of the dimension the rank holds of this stretch, [local]; -1 where it holds a zero. Sizes are fixed."""
        outer, size, inner, block = (cast(int, item) for item in (self.outer, self.size, self.inner, self.block))
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
    """How a value lies on the ranks.

    dims: the dimensions that are sharded, in order, each with its spans; more than one where key/value groups and the heads in
        a group are told apart. partial: whether the value is the sum of what the ranks hold.
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
        """True for a value of which each rank has the tokens at its own positions."""
        return len(self.dims) == 1 and self.dims[0][1][0].site == POSITIONS

    def spans(self, dim: int) -> Spans:
        """How a dimension is sharded; empty when it is not."""
        return next((spans for index, spans in self.dims if index == dim), ())

    @property
    def placements(self) -> tuple[Placement, ...]:
        """The same in torch's vocabulary, one for each dimension that is sharded, or the one there is."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        if self.partial:
            return (Partial(),)
        return tuple(Shard(dim) for dim, _ in self.dims) or (Replicate(),)

    def __str__(self) -> str:
        if self.partial:
            return "Partial"
        return " ".join(f"Shard({dim})" for dim, _ in self.dims) or "Replicate"


REPLICATED = Placed()
PARTIAL = Placed(partial=True)


def sharded(*dims: tuple[int, Spans]) -> Placed:
    """A value sharded along these dimensions; those of which every rank has all are left out."""
    split = [(dim, spans) for dim, spans in dims if any(span.parts > 1 for span in spans)]
    return Placed(tuple(sorted(split, key=lambda item: item[0])))


def local_size(spans: Spans, size: Size) -> Size:
    """The size of a dimension on a rank."""
    return sum((span.local for span in spans), start=cast(Size, 0)) if spans else size


def is_padded(placed: Placed) -> bool:
    """True when a rank may hold what the value has not."""
    return any(span.is_padded for _, spans in placed.dims for span in spans)


def can_gather(placed: Placed, world_size: int) -> bool:
    """True when the blocks of all ranks laid end to end are the value: one stretch, a block a rank."""
    if len(placed.dims) != 1:
        return False
    spans = placed.dims[0][1]
    return len(spans) == 1 and spans[0].outer == 1 and spans[0].parts == world_size


def padded_share(spans: Spans) -> str:
    """`9 as 10`: how many units there are and are held where they do not divide; empty where they do."""
    return next((f"{span.size} as {span.block * span.parts}" for span in spans if span.is_padded), "")


def indices_of(spans: Spans, rank: int) -> torch.Tensor:
    """Which indices of a dimension a rank holds, in its order, [local]; -1 where it holds a zero. Sizes are fixed."""
    found, start = list[torch.Tensor](), 0
    for span in spans:
        found.append(span.indices(rank, start))
        start += cast(int, span.whole)
    return torch.cat(found)


def local_part(weight: torch.Tensor, placed: Placed, rank: int) -> torch.Tensor:
    """What a rank holds of a weight: a view where its indices are neighbours, else a copy, zeros where nothing is there.

    Of a partial weight the first rank holds all and the others zeros.
    """
    if placed.partial:
        return weight if rank == 0 else torch.zeros_like(weight)
    for dim, spans in placed.dims:
        weight = _take(weight, dim, indices_of(spans, rank))
    return weight


def _take(weight: torch.Tensor, dim: int, indices: torch.Tensor) -> torch.Tensor:
    first = int(indices[0])
    if first >= 0 and torch.equal(indices, torch.arange(first, first + len(indices))):
        return weight.narrow(dim, first, len(indices))
    # Through bytes, which every dtype can be selected and zeroed as.
    stored = weight.view(torch.uint8) if weight.dtype == torch.float8_e4m3fn else weight
    indices = indices.to(weight.device)
    found = stored.index_select(dim, indices.clamp_min(0))
    missing = (indices < 0).nonzero().flatten()
    return (found.index_fill(dim, missing, 0) if len(missing) else found).view(weight.dtype)


def whole_of(parts: Sequence[torch.Tensor], placed: Placed, shape: Sequence[int]) -> torch.Tensor:
    """The value that the ranks hold the parts of.

    shape: of the whole; sizes of dimensions that are not sharded are those of the parts.
    """
    if placed.partial:
        return torch.stack([*parts]).sum(0)
    if not placed.dims:
        return parts[0]
    sizes = [shape[dim] if placed.spans(dim) else size for dim, size in enumerate(parts[0].shape)]
    found = parts[0].new_zeros(sizes)
    for rank, part in enumerate(parts):
        places = [torch.arange(size) for size in sizes]
        kept = part
        for dim, spans in placed.dims:
            indices = indices_of(spans, rank)
            kept = kept.index_select(dim, (indices >= 0).nonzero().flatten())
            places[dim] = indices[indices >= 0]
        found[torch.meshgrid(*places, indexing="ij")] = kept
    return found


def at_sizes(placed: Placed, value_of: dict[sympy.Symbol, int]) -> Placed:
    """The placement with the sizes a call has in place of symbols."""

    def settle(size: Size) -> Size:
        return int(size.xreplace(value_of)) if isinstance(size, sympy.Basic) else size  # pyright: ignore

    return Placed(
        tuple(
            (dim, tuple(s.shaped(settle(s.outer), settle(s.size), settle(s.inner)) for s in spans))
            for dim, spans in placed.dims
        ),
        placed.partial,
    )
