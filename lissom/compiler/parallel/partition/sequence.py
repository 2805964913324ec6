"""Values sharded by position, as calls and collectives; see `rules/sequence.py`.

Of [batch, positions, …] each rank holds ⌈positions / world size⌉ positions. Where they do not divide, the last ranks hold
padding: zeros, or copies of the last token. Computation on these values is position-wise, so padding changes no other
position, and the all-gather drops it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.collectives import ALL_GATHER, GROUP, REDUCE_SCATTER, WAIT
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.placement import Placed
from lissom.compiler.ir.types import Size

aten = torch.ops.aten


@dataclass(frozen=True)
class _Length:
    """A sequence length: of the whole value, of a rank's block, of all blocks together, and the padding among these."""

    whole: fx.Node | int
    block: fx.Node | int
    filled: fx.Node | int
    more: fx.Node | int


@dataclass(frozen=True)
class Positions:
    """Shards values by position and gathers them again; use inside `edit.before`.

    Attributes:
        own: makes a weight that differs between ranks, from its name and values.
    """

    edit: Editor
    world_size: int
    own: Callable[[str, list[torch.Tensor]], fx.Node]
    lengths: dict[Size, _Length] = field(default_factory=dict[Size, _Length])
    indices: dict[Size, fx.Node] = field(default_factory=dict[Size, fx.Node])

    def scattered(self, value: fx.Node, want: Placed) -> fx.Node:
        """Reduce-scatter: each rank's positions of a sum over ranks."""
        call, length, rank = self.edit.call, self._length(value, want), nodes.tensor_type(value).rank
        if length.more != 0:
            value = call(aten.constant_pad_nd.default, value, [*[0, 0] * (rank - 2), 0, length.more])
        # The operator scatters along the first dimension.
        value = call(aten.clone.default, call(aten.transpose.int, value, 0, 1), memory_format=torch.contiguous_format)
        own = call(WAIT, call(REDUCE_SCATTER, value, "sum", self.world_size, GROUP))
        return call(aten.transpose.int, own, 0, 1)

    def own_part(self, value: fx.Node, want: Placed) -> fx.Node:
        """A rank's positions of a replicated value; past the end, copies of the last."""
        return self.edit.call(aten.index_select.default, value, 1, self._indices(self._length(value, want), want, clamped=True))

    def gathered(self, value: fx.Node, have: Placed) -> fx.Node:
        """All-gather along positions."""
        call, length = self.edit.call, self.lengths[_size(have)]
        value = call(aten.clone.default, call(aten.transpose.int, value, 0, 1), memory_format=torch.contiguous_format)
        whole = call(aten.transpose.int, call(WAIT, call(ALL_GATHER, value, self.world_size, GROUP)), 0, 1)
        return whole if length.more == 0 else call(aten.slice.Tensor, whole, 1, 0, length.whole)

    def spread(self, value: fx.Node, have: Placed) -> fx.Node:
        """A rank's positions, zeros at those of other ranks: a partial sum."""
        call, length, typed = self.edit.call, self.lengths[_size(have)], nodes.tensor_type(value)
        sizes = [length.filled if dim == 1 else self.edit.size(value, dim) for dim in range(typed.rank)]
        zeros = call(aten.zeros.default, sizes, dtype=typed.dtype, device=typed.device)
        padded = call(aten.index_copy.default, zeros, 1, self._indices(length, have, clamped=False), value)
        return padded if length.more == 0 else call(aten.slice.Tensor, padded, 1, 0, length.whole)

    def _length(self, value: fx.Node, want: Placed) -> _Length:
        """The lengths of a value, computed at the first value of that length."""
        size, ranks = _size(want), self.world_size
        if size not in self.lengths:
            whole = self.edit.size(value, 1)
            if isinstance(whole, int):
                block = -(-whole // ranks)
                self.lengths[size] = _Length(whole, block, block * ranks, block * ranks - whole)
            else:
                compute = self.edit.compute_size
                block = compute(operator.floordiv, compute(operator.add, whole, ranks - 1), ranks)
                filled = compute(operator.mul, block, ranks)
                self.lengths[size] = _Length(whole, block, filled, compute(operator.sub, filled, whole))
        return self.lengths[size]

    def _indices(self, length: _Length, placed: Placed, *, clamped: bool) -> fx.Node:
        """The positions that a rank holds."""
        call, size = self.edit.call, _size(placed)
        if size not in self.indices:
            number = self.own("rank.number", [torch.full((), rank, dtype=torch.int64) for rank in range(self.world_size)])
            first = call(aten.mul.Scalar, number, length.block)
            places = call(aten.arange.default, length.block, device=nodes.tensor_type(number).device)
            self.indices[size] = call(aten.add.Tensor, places, first)
        indices = self.indices[size]
        if not clamped or length.more == 0:
            return indices
        last = length.whole - 1 if isinstance(length.whole, int) else self.edit.compute_size(operator.sub, length.whole, 1)
        return call(aten.clamp_max.default, indices, last)


def _size(placed: Placed) -> Size:
    """The number of positions."""
    return placed.dims[0][1][0].size
