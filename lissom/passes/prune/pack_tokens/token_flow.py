"""The values of a program that are needed at real tokens only.

Starting at embeddings and at layers that read an input, values are followed through position-wise operators, and through
attention whose mask hides padding. Such a value is *loose*: it has to be correct at the kept positions only. The flow ends
where a mask sets padding to zero, or where single positions are selected, which are then kept too. Where a loose value reaches
any other reader, such as an output or a sum over all positions, the program does read padding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import is_attention, is_linear
from lissom.compiler.analysis.structure.operands import mask_of
from lissom.compiler.analysis.structure.padding import Values, hides, holds, kept_rows, zero_where_hidden
from lissom.compiler.analysis.token_positions import operands, position_sources, row_position
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.calls import Attention, Binary, Embedding, Linear, MaskedFill, Where
from lissom.compiler.ir.dimension_map import shape_of
from lissom.compiler.ir.dimensions import Slot
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import TensorType
from lissom.compiler.ir.view_calls import Select

aten = torch.ops.aten

Place = tuple[int, int]
"""The batch and the token dimension of a value."""
FIRST: Place = (0, 1)
HEADS: Place = (0, 2)
"""The place in [batch, heads, tokens, features]."""
Check = Callable[[torch.Tensor, torch.Tensor], bool]
"""A check of a value, given the kept positions."""
Use = Literal["output", "positions", "operands", "mask"]
"""Ways to read padding: as an output; by a call that mixes positions; as an attention's operand; past an attention's mask."""

_PACKED_VIEWS = {*ops.SIZED_RESHAPES, *ops.PARTS, *ops.SEVERAL}
"""Views that packed tokens support: they keep batch and tokens as they are."""
_VIEWS = {*_PACKED_VIEWS, *ops.SAME_VALUES, *ops.EXPANDS, aten.contiguous.default}


class PaddingReadError(Exception):
    """The program reads padding.

    Attributes:
        node: the reader.
        use: how it reads padding.
    """

    def __init__(self, node: fx.Node, use: Use) -> None:
        super().__init__(use)
        self.node = node
        self.use: Use = use


@dataclass
class TokenFlow:
    """The flow of the tokens of one padding mask through a program.

    Attributes:
        places: the loose values, with their batch and token dimensions.
        packed: those of them to compute at kept positions only, in order.
        chosen: calls that read single positions of a loose value.
        positions: constant ones, and tensors with one per row.
    """

    program: Program
    mask: fx.Node
    places: dict[fx.Node, Place] = field(default_factory=dict[fx.Node, Place])
    packed: dict[fx.Node, None] = field(default_factory=dict[fx.Node, None])
    chosen: dict[fx.Node, None] = field(default_factory=dict[fx.Node, None])
    positions: dict[int | fx.Node, None] = field(default_factory=dict["int | fx.Node", None])
    _checks: list[tuple[fx.Node, fx.Node, Check]] = field(default_factory=list["tuple[fx.Node, fx.Node, Check]"])

    def run(self) -> TokenFlow:
        """Follow the tokens.

        Raises:
            PaddingReadError: if a call reads padding.
        """
        for node in self.program.nodes():
            loose = {slot: self.places[operand] for slot, operand in operands(node).items() if operand in self.places}
            if not loose:
                self._start(node)
            elif is_attention(node):
                self._attention(node, loose)
            elif not isinstance(nodes.node_type(node), (TensorType, tuple)):
                continue
            elif not self._is_zeroed(node, loose) and not self._is_chosen(node, loose):
                if (place := place_of(node, loose)) is None:
                    raise PaddingReadError(node, "positions")
                self.places[node] = place
        for leaf in self.program.output.all_input_nodes:
            if leaf in self.places:
                raise PaddingReadError(leaf, "output")
        for reader, mask, check in self._checks:
            if not self._holds(mask, check):
                raise PaddingReadError(reader, "mask")
        self._choose_packed()
        return self

    def kept(self, values: Values) -> torch.Tensor:
        """The positions that are kept, [batch, tokens], from the values of the mask and of computed positions."""
        kept = kept_rows(values[self.mask])
        for position in self.positions:
            if isinstance(position, int):
                kept[:, position] = True
            else:
                kept[torch.arange(len(kept)), values[position]] = True
        return kept

    def _holds(self, value: fx.Node, check: Check) -> bool:
        wanted = [value, *(position for position in self.positions if isinstance(position, fx.Node))]
        return holds(self.program, self.mask, wanted, lambda values: check(values[value], self.kept(values)))

    def _start(self, node: fx.Node) -> None:
        """Start at an embedding of, or a layer over, [batch, tokens, ...]."""
        if not nodes.is_call(node, *Embedding.targets, *Linear.targets):
            return
        sizes, source = nodes.tensor_type(self.mask).shape, nodes.argument(node, "indices", "input")
        if shape_of(node)[:2] == sizes and shape_of(source)[:2] == sizes and len(shape_of(node)) > 2:
            self.places[node] = FIRST

    def _attention(self, node: fx.Node, loose: dict[Slot, Place]) -> None:
        attention = Attention(node)
        q, k, v = attention.q, attention.k, attention.v
        rank = len(shape_of(node))
        batches, tokens = ({place[dim] for place in loose.values()} for dim in (0, 1))
        if not loose.keys() <= {0, 1, 2} or tokens != {rank - 2} or len(batches) > 1 or not batches <= {*range(rank - 2)}:
            raise PaddingReadError(node, "operands")
        if k in self.places or v in self.places:
            mask = mask_of(node)
            if mask is None or rank != 4:
                raise PaddingReadError(node, "mask")
            self._checks.append((node, mask, partial(hides, own=q in self.places)))
        if q in self.places:
            self.places[node] = self.places[q]

    def _is_zeroed(self, node: fx.Node, loose: dict[Slot, Place]) -> bool:
        """True for a `where` or product with a value that may be zero at padding, which is checked at the end."""
        if len(loose) > 1:
            return False
        ((slot, place),) = loose.items()
        fills, rank, mask = nodes.is_call(node, *MaskedFill.targets) and slot == 0, len(shape_of(node)), None
        if fills:
            mask = MaskedFill(node).mask
        elif nodes.is_call(node, *Where.targets) and slot == 1:
            mask = Where(node).condition
        elif nodes.is_call(node, aten.mul.Tensor):
            mask = Binary(node).right if slot == 0 else Binary(node).left
        if not nodes.is_tensor(mask) or rank != len(shape_of(operands(node)[slot])):
            return False

        def is_zero(value: torch.Tensor, kept: torch.Tensor) -> bool:
            return zero_where_hidden(~value if fills else value, kept, place, rank)

        # Positions that later calls select are kept too, which only makes this easier to satisfy.
        return self._holds(mask, is_zero)

    def _is_chosen(self, node: fx.Node, loose: dict[Slot, Place]) -> bool:
        """True for a call that reads one position per row, computed without loose values."""
        if list(loose) != [0]:
            return False
        batch_dim, token_dim = loose[0]
        rank, selected = len(shape_of(nodes.operand(node))), Select.of(node)
        if selected is not None and selected.dim % rank == token_dim:
            if not isinstance(selected.index, int):
                return False
            self.positions[selected.index] = None
        elif nodes.is_call(node, aten.index.Tensor) and (batch_dim, token_dim) == FIRST:
            position = row_position(self.program, node)
            # It must not depend on loose values, so that it can be evaluated on test inputs.
            if position is None or not holds(self.program, self.mask, [position], lambda values: True):
                return False
            self.positions[position] = None
        else:
            return False
        self.chosen[node] = None
        return True

    def _choose_packed(self) -> None:
        """The calls to compute in packed form: over [batch, tokens, ...] or heads of them, and the views between them."""
        wanted = {node for node in self.places if self._packs(node)}
        views = {node for node in self.places if node.target in _VIEWS or is_item(node)}
        for node in reversed(self.places):
            if node in views and node in wanted and wanted.isdisjoint(node.users):
                wanted.discard(node)
        for node in self.places:
            sources = [operand for operand in operands(node).values() if operand in self.places]
            whole = is_item(node) and sources[0] in self.packed
            if whole or (node in wanted and (node not in views or all(operand in self.packed for operand in sources))):
                self.packed[node] = None

    def _packs(self, node: fx.Node) -> bool:
        """True when the call can run on packed tokens: its loose values and its result have one place, or it makes heads."""
        places = {self.places[operand] for operand in operands(node).values() if operand in self.places} | {self.places[node]}
        if self.places[node] == HEADS and (len(shape_of(node)) != 4 or not self.chosen.keys().isdisjoint(node.users)):
            return False
        if node.target in (aten.transpose.int, aten.permute.default):
            return places == {FIRST, HEADS} and self.places[node] == HEADS
        if is_attention(node) or len(places) > 1 or not places <= {FIRST, HEADS}:
            return False
        if HEADS in places and node.target in _VIEWS:
            return False
        if node.target in ops.SIZED_RESHAPES:
            return shape_of(node)[:2] == shape_of(nodes.operand(node))[:2] and all(
                isinstance(size, int) for size in shape_of(node)[2:]
            )
        return node.target not in _VIEWS or node.target in _PACKED_VIEWS


def is_item(node: fx.Node) -> bool:
    """True for one of the results of a call with several."""
    return node.target is operator.getitem


def place_of(node: fx.Node, loose: dict[Slot, Place]) -> Place | None:
    """The batch and token dimensions of a call's result; None when it mixes positions."""
    rank = len(shape_of(node))
    sources = [position_sources(node, dim) or {} for dim in range(rank)]
    place_dims: list[int] = []
    for which in (0, 1):
        dims = [
            dim for dim, known in enumerate(sources) if all(known.get(slot) == place[which] for slot, place in loose.items())
        ]
        if len(dims) != 1:
            return None
        place_dims += dims
    return place_dims[0], place_dims[1]


def has_layers(flow: TokenFlow) -> bool:
    """True when packing saves matrix products."""
    return any(is_linear(node) for node in flow.packed)
