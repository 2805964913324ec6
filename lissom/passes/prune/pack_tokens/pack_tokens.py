"""Run per-token operators on real tokens only: gathered from the padded batch once, and padded again around attention.

    rows = indices of the real tokens in mask [batch, tokens]        packed = x[rows]           [1, real tokens, features]
    slot[b, t] = (number of real tokens up to (b, t)) - 1       padded = packed[slot]      [batch, tokens, features]

Linear layers, norms, activations, embeddings, residual adds and rotary embeddings of heads run on the packed rows, one long
sequence; attention and all other operators across tokens run on the padded form. Both conversions are lookups of whole rows,
which every backend supports; on a CPU the backend `eager` fuses them into attention (`fuse-unpadded-attention`), which then
reads packed rows where they are. In the padded form a padding position holds a copy of the last real token before it, which
nothing may read.
The pass is exact because it follows every value to where a mask hides padding, padding is set to zero, or one position is
selected, and leaves the program alone where a value reaches any other reader. A row keeps all its positions if its selected
position (`[CLS]`, the last token) is padding, or if it has no real token: attention from padding may see other padding.

The number of real tokens is known only at run time; the history counts FLOPs as if all tokens were real.

ByteTransformer (Zhai et al. 2022, §III.D) removes padding in the same way, with an attention kernel over packed rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial, reduce

import torch
from torch import fx

from lissom.compiler.analysis.structure.padding import padding_masks
from lissom.compiler.analysis.token_positions import operands, position_sources, with_operands
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.dimension_map import shape_of
from lissom.compiler.ir.dimensions import Slot
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import SIZED_RESHAPES
from lissom.compiler.ir.view_calls import Item, SymSize
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.compiler.transforms.unflatten import unflatten_where
from lissom.passes.prune.pack_tokens.token_flow import HEADS, PaddingReadError, TokenFlow, Use, has_layers

aten = torch.ops.aten


_OBSTACLES: Mapping[Use, str] = {
    "output": "it is an output, at padding positions too; put zero-padding in front if nobody reads these",
    "mask": "its mask does not hide padding",
    "operands": "its operands or its mask mix tokens in a way that is not followed",
    "positions": "it reads positions that may be padding",
}
"""The reason tokens cannot be packed, by the way padding is read."""


@dataclass(frozen=True)
class PackTokens(Rewrite):
    """Computes per-token operators on real tokens only, without padding."""

    def run(self, edit: Editor) -> None:
        unflatten_where(edit, _packs)
        for mask in edit.program.fact(padding_masks):
            try:
                flow = TokenFlow(edit.program, mask).run()
            except PaddingReadError as error:
                edit.skip(error.node, _OBSTACLES[error.use])
                continue
            if has_layers(flow):
                _Packer(edit, flow).run()


def _packs(edit: Editor) -> bool:
    """True when there are tokens to pack."""
    with suppress(PaddingReadError):
        return any(has_layers(TokenFlow(edit.program, mask).run()) for mask in edit.program.fact(padding_masks))
    return False


@dataclass
class _Packer:
    """Replaces padded calls by packed ones."""

    edit: Editor
    flow: TokenFlow
    new: dict[fx.Node, fx.Node] = field(default_factory=dict[fx.Node, fx.Node])
    gathered: dict[tuple[fx.Node, int | None, int | None, bool], fx.Node] = field(default_factory=dict)

    def run(self) -> None:
        first = next(iter(self.flow.packed))
        for position in self.flow.positions:
            if isinstance(position, fx.Node):
                self.edit.move_before(position, first)
        with self.edit.before(first, like=[self.flow.mask]):
            self._index(self._kept())
        for node in list(self.flow.packed):
            self.edit.current = node
            self._pack(node)

    def _kept(self) -> fx.Node:
        """The positions to keep, bool [batch, tokens]."""
        call, mask = self.edit.call, self.flow.mask
        real = call(aten.ne.Scalar, mask, 0)
        whole = call(aten.logical_not.default, call(aten.any.dim, real, 1, True))
        if self.flow.positions:
            padding = call(aten.logical_and.default, self._chosen(), call(aten.logical_not.default, real))
            whole = call(aten.logical_or.default, whole, call(aten.any.dim, padding, 1, True))
        return call(aten.logical_or.default, real, whole)

    def _chosen(self) -> fx.Node:
        """The positions that later calls select, bool [batch, tokens]."""
        call, chosen = self.edit.call, list[fx.Node]()
        start = self._numbers(1)
        end = call(aten.sub.Scalar, call(aten.sub.Tensor, start, call(aten.amax.default, start, [1], True)), 1)
        for position in self.flow.positions:
            if isinstance(position, int):
                conditions = [call(aten.eq.Scalar, start if position >= 0 else end, position)]
            else:
                column = call(aten.unsqueeze.default, position, 1)
                conditions = [call(aten.eq.Tensor, counted, column) for counted in (start, end)]
            chosen = [reduce(partial(call, aten.logical_or.default), [*chosen, *conditions])]
        return chosen[0]

    def _numbers(self, dim: int) -> fx.Node:
        """The number of each position's row (dim 0) or token (dim 1), [batch, tokens]."""
        ones = self.edit.call(aten.ones_like.default, self.flow.mask, dtype=torch.int64)
        return self.edit.call(aten.sub.Scalar, self.edit.call(aten.cumsum.default, ones, dim), 1)

    def _index(self, kept: fx.Node) -> None:
        """The indices of the kept positions in the batch, and of each position among the kept ones."""
        call = self.edit.call
        self.batch, self.tokens = (self.edit.size(self.flow.mask, dim) for dim in (0, 1))
        flat = call(aten.reshape.default, kept, [-1])
        self.rows = call(aten.squeeze.dim, call(aten.nonzero.default, flat), 1)
        counted = call(aten.cumsum.default, call(aten.to.dtype, flat, torch.int64), 0)
        # A position before the first kept one takes that one.
        self.slots = call(aten.clamp_min.default, call(aten.sub.Scalar, counted, 1), 0)
        self.count = call(aten.sym_size.int, self.rows, 0)

    def _pack(self, node: fx.Node) -> None:
        edit = self.edit
        with edit.before(node):
            args, kwargs = with_operands(node, self._operands(node))
            if node.target in SIZED_RESHAPES:
                args[1] = [1, self.count, *shape_of(node)[2:]]
            if (item := Item.of(node)) is not None:
                new = edit.item(self.new[item.source], item.index)
            else:
                new = edit.call(nodes.overload(node), *args, **kwargs)
        self.new[node] = new
        for user in list(node.users):
            if user in self.flow.chosen:
                self._choose(user, new)
            elif nodes.is_call(user, aten.sym_size.int):
                with edit.before(user):
                    edit.replace(user, self._size(node, new, SymSize(user).dim))
        if any(user not in self.flow.packed for user in node.users):
            with edit.before(node.next, like=[node]):
                padded = self._padded(new, self.flow.places[node] == HEADS)
            edit.replace(node, padded)
            self.new[padded] = new
            self.flow.packed[padded] = None
        else:
            edit.rewritten += 1

    def _operands(self, node: fx.Node) -> dict[Slot, object]:
        """The operands that the packed call changes, by argument position."""
        place = self.flow.places[node]
        by_batch, by_tokens = (position_sources(node, dim) or {} for dim in place)
        changed: dict[Slot, object] = {}
        for slot, operand in operands(node).items():
            if operand in self.new:
                changed[slot] = self.new[operand]
            elif slot in by_batch or slot in by_tokens:
                changed[slot] = self._gathered(operand, by_batch.get(slot), by_tokens.get(slot), place == HEADS)
        return changed

    def _gathered(self, value: fx.Node, batch_dim: int | None, token_dim: int | None, heads: bool) -> fx.Node:
        """The kept rows of a padded value; a value without batch or tokens is indexed by the dimension it has.

        Args:
            heads: the tokens are behind heads.
        """
        key = (value, batch_dim, token_dim, heads)
        if key not in self.gathered:
            self.gathered[key] = self._gather(*key)
        return self.gathered[key]

    def _gather(self, value: fx.Node, batch_dim: int | None, token_dim: int | None, heads: bool) -> fx.Node:
        call = self.edit.call
        if batch_dim is not None and token_dim is not None:
            first = call(aten.transpose.int, value, 1, 2) if heads else value
            flat = call(aten.reshape.default, first, [1, -1, *shape_of(first)[2:]])
            kept_rows = call(aten.index_select.default, flat, 1, self.rows)
            return call(aten.transpose.int, kept_rows, 1, 2) if heads else kept_rows
        numbers = call(aten.reshape.default, self._numbers(0 if token_dim is None else 1), [-1])
        wanted = call(aten.index_select.default, numbers, 0, self.rows)
        if token_dim is not None:
            return call(aten.index_select.default, value, token_dim, wanted)
        return call(aten.transpose.int, call(aten.index_select.default, value, batch_dim, wanted), 0, 2 if heads else 1)

    def _padded(self, packed: fx.Node, heads: bool) -> fx.Node:
        """A packed value in padded form.

        Args:
            heads: its tokens are behind heads, [1, heads, tokens, features].
        """
        if not heads:
            return self._unpacked(packed, self.slots, [self.batch, self.tokens])
        spread = self.edit.call(aten.index_select.default, packed, 2, self.slots)
        _, count, _, features = shape_of(packed)
        apart = self.edit.call(aten.reshape.default, spread, [count, self.batch, self.tokens, features])
        return self.edit.call(aten.transpose.int, apart, 0, 1)

    def _unpacked(self, packed: fx.Node, slots: fx.Node, sizes: list[fx.Node | int]) -> fx.Node:
        """A packed value in padded form, with these sizes."""
        spread = self.edit.call(aten.index_select.default, packed, 1, slots)
        return self.edit.call(aten.reshape.default, spread, [*sizes, *shape_of(packed)[2:]])

    def _choose(self, user: fx.Node, packed: fx.Node) -> None:
        """Read the selected position of each row from the packed value."""
        edit = self.edit
        with edit.before(user):
            slots = edit.call(aten.reshape.default, self.slots, [self.batch, self.tokens])
            slots = edit.again(user, slots)
            chosen = self._unpacked(packed, slots, [self.batch])
        edit.replace(user, chosen)

    def _size(self, node: fx.Node, new: fx.Node, dim: int) -> fx.Node:
        """The size of a dimension of the padded value."""
        place, dim = self.flow.places[node], dim % len(shape_of(node))
        if dim in place:
            return self.edit.call(aten.sym_size.int, self.flow.mask, place.index(dim))
        return self.edit.call(aten.sym_size.int, new, dim)
