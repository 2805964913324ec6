"""Let attention on a CPU read the tokens of several texts without padding, as `pack-tokens` leaves them.

    q, k, v = heads of x[slots];  y = joined(lissom::fused_attention(q, k, v, mask))[rows]
        ->  y = joined(lissom::unpadded_attention(heads of x …, slots, rows, mask))

`pack-tokens` looks up padded queries, keys and values before an attention, and takes the real tokens of its result. Here
the attention does neither: it reads the rows of each text where they are, and computes no padded query. A sliding window, which
`lower-sparse-attention` found, becomes the distances that a query sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from lissom.compiler.analysis.structure.operands import SWAPPED, joined_heads
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import AttentionKernel, BlockSparseAttention
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.formula import Formula, Match
from lissom.compiler.ir.match import only_user
from lissom.compiler.ir.operators import RESHAPES
from lissom.compiler.ir.types import TensorType
from lissom.compiler.ir.view_calls import IndexSelect, Reshape
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.ops.fused_attention import fused_attention, unpadded_attention
from lissom.ops.pattern import Pattern

aten = torch.ops.aten


_LOOKUP = Formula(
    f"""
    front = SIZED_RESHAPES(index_select(packed, 2, slots), sizes)
    sized = SIZED_RESHAPES(index_select(packed, 1, slots), sizes)
    x = RESHAPES(sized, ...) | sized
    transpose(front, 0, 1) | {SWAPPED}
    """,
    lambda found: _is_lookup(found),
    sizes=object,
)
"""Heads [batch, heads, tokens, features] that are looked up in a value without padding.

packed: [1, heads, tokens, features], or with the tokens in front. slots: the row for each position. front: heads in front.
"""


@dataclass(frozen=True)
class FuseUnpaddedAttention(Rewrite):
    """Fuses the lookups of padded tokens around attention into its kernel."""

    def run(self, edit: Editor) -> None:
        attentions = [AttentionKernel(node) for node in edit.nodes(*AttentionKernel.targets)]
        padded = [(call.node, [*filter(None, map(_LOOKUP.match, (call.q, call.k, call.v)))]) for call in attentions]
        sites = edit.accepted((node, _site(node, lookups)) for node, lookups in padded if len(lookups) == 3)
        slots: dict[object, fx.Node] = {}
        for node, site in sites.items():
            _read_unpadded(edit, node, site, slots)


def _is_lookup(found: Match) -> bool:
    """True for rows of one sequence, whose batch and tokens the heads keep."""
    shapes = [nodes.tensor_type(found.values.get(name, found.root)).shape[:2] for name in ("sized", "x")]
    return nodes.tensor_type(found["packed"]).shape[0] == nodes.tensor_type(found["slots"]).rank == 1 and shapes[0] == shapes[1]


def _padding(lookup: Match) -> tuple[object, ...]:
    """The row for each position, and the sizes of batch and tokens."""
    front = "front" in lookup.values
    sizes = Reshape(lookup["front" if front else "sized"]).sizes
    return lookup["slots"], *(sizes[1:3] if front else sizes[:2])


class _Site(NamedTuple):
    """The unpadded form of an attention on padded heads.

    Attributes:
        lookups: of queries, keys and values.
        selection: the rows taken of its result, [1, rows, features].
        band: the distances from a query to the keys that it sees, as options of the kernel.
    """

    lookups: list[Match]
    selection: fx.Node
    band: dict[str, int]


def _site(attention: fx.Node, lookups: list[Match]) -> _Site | str:
    """The site of an attention that can read tokens without padding; the reason if it cannot."""
    if any(attention.kwargs.get(name) is not None for name in ("sinks", "k_scale", "v_scale")):
        return "it has sinks, or keys and values in int8"
    if len({_padding(lookup) for lookup in lookups}) > 1:
        return "its queries, keys and values are padded in different ways"
    selection, band = _selection(attention), _band(attention)
    if selection is None:
        return "something else than the real tokens of its result is read"
    return "its pattern is no window" if band is None else _Site(lookups, selection, band)


def _band(attention: fx.Node) -> dict[str, int] | None:
    """The band of an attention; None where it has none."""
    if attention.target is fused_attention:
        return {"high": 0} if attention.kwargs.get("causal") else {}
    sparse = BlockSparseAttention(attention)
    pattern = Pattern.decode(sparse.pattern, sparse.block)
    return None if pattern.band is None else dict(zip(("low", "high"), pattern.band, strict=True))


def _selection(attention: fx.Node) -> fx.Node | None:
    """The rows that are taken of an attention's result, [1, rows, features], where nothing else reads it."""
    joined = joined_heads(attention)
    flat = None if joined is None else only_user(joined)
    selection = only_user(flat) if nodes.is_call(flat, *RESHAPES) else None
    rows = IndexSelect.of(selection)
    if rows is None or rows.dim != 1 or rows.x is not flat:
        return None
    shapes = [nodes.tensor_type(tensor).shape for tensor in (flat, joined)]
    return selection if len(shapes[0]) == 3 and shapes[0][0] == 1 and shapes[0][2] == shapes[1][2] else None


def _read_unpadded(edit: Editor, node: fx.Node, site: _Site, slots: dict[object, fx.Node]) -> None:
    """Replace an attention.

    Args:
        slots: [batch, tokens], of attentions before it, by lookup.
    """
    (lookups, selection, band), attention = site, AttentionKernel(node)
    padding = _padding(lookups[0])
    options = {name: node.kwargs[name] for name in ("scale", "softcap") if name in node.kwargs}
    if padding not in slots:
        with edit.before(node):  # and so before those of attentions that follow
            slots[padding] = edit.call(aten.reshape.default, padding[0], [*padding[1:]])
    with edit.before(selection, like=[node]):
        types = map(nodes.tensor_type, (attention.q, attention.k, attention.v))
        heads = [_heads(edit, lookup["packed"], given) for lookup, given in zip(lookups, types, strict=True)]
        rows = IndexSelect(selection).indices
        unpadded = edit.call(unpadded_attention, *heads, slots[padding], rows, attention.bias, **options, **band)
        edit.succeed(node, unpadded)
        joined = edit.call(aten.transpose.int, unpadded, 1, 2)
        features = nodes.tensor_type(selection).shape[2]
        call = edit.call(aten.reshape.default, joined, [1, -1, features])
    edit.replace(selection, call)


def _heads(edit: Editor, packed: fx.Node, padded: TensorType) -> fx.Node:
    """The packed value as [1, heads, tokens, features].

    Args:
        padded: the type of its heads in padded form.
    """
    _, heads, _, features = padded.shape
    shape = nodes.tensor_type(packed).shape
    if len(shape) == 4 and shape[1] == heads and shape[3] == features:
        return packed
    apart = packed if len(shape) == 4 else edit.call(aten.reshape.default, packed, [1, -1, heads, features])
    return edit.call(aten.transpose.int, apart, 1, 2)
