"""Pruned vocabularies: dropped ids are masked, then their rows are removed, then the program may take new ids.

    masked       embedding(T, new_ids[ids])                   new_ids[i] = i, or the unknown token for a dropped id
                 masked_fill(x Wᵀ + b, dropped, -inf)
    removed      embedding(T[kept], new_ids[ids])             new_ids[i] = the place of i in kept
                 pad(x W[kept]ᵀ + b[kept], -inf)[..., places] the last place for a dropped id
    renumbered   embedding(T[kept], ids)                      x W[kept]ᵀ + b[kept]

The first step changes the numbers, the second only the form, and the third what ids mean.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import is_id_table, second_factor
from lissom.compiler.analysis.token_ids import Head, TokenIds, is_logit_mask
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.calls import AddedProduct, Dequantize, Embedding
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.vocabulary import Vocabulary
from lissom.ops.formats import FORMATS
from lissom.ops.quantization import fake_quantize

aten = torch.ops.aten

Selected = dict[fx.Node, int]
"""Weights whose indices are removed, with the dimension."""


def mask_vocabulary(edit: Editor, tokens: TokenIds, vocabulary: Vocabulary) -> None:
    """Read dropped ids as the unknown token, and set their logits to -inf."""
    device = nodes.tensor_type(tokens.lookups[0]).device
    new_ids = vocabulary.readable(torch.arange(vocabulary.size)).unsqueeze(1).to(device)
    dropped = vocabulary.dropped.to(device)
    read: dict[fx.Node, fx.Node] = {}
    for lookup in tokens.lookups:
        ids = Embedding(lookup).ids
        if ids not in read:
            with edit.before(lookup):
                table = edit.weight("vocabulary.new_ids", new_ids)
                read[ids] = edit.call(aten.squeeze.dim, edit.call(aten.embedding.default, table, ids), -1)
        nodes.set_argument(lookup, "indices", read[ids])
        edit.rewritten += 1
    for head in tokens.heads:
        logits = head.logits
        with edit.before(logits.next, like=[logits]):
            masked = edit.call(aten.masked_fill.Scalar, logits, edit.weight("vocabulary.dropped", dropped), -math.inf)
        logits.replace_all_uses_with(masked, delete_user_cb=lambda user, own=masked: user is not own)
        edit.rewritten += 1
    edit.program.edits += 1


def removal(edit: Editor, tokens: TokenIds, size: int) -> Selected | str:
    """The weights whose rows are removed with ids, and the dimension of the ids in each; or why that is not possible.

    Args:
        size: the number of ids.
    """
    selected: Selected = {}
    seen: set[fx.Node] = set()
    starts = [(Embedding(node).table, 0) for node in tokens.lookups]
    for head in tokens.heads:
        weight = second_factor(head.linear)
        assert weight is not None, "an LM head is a linear layer"
        starts.append((weight, 0 if head.linear.target is aten.linear.default else nodes.tensor_type(weight).rank - 1))
        starts += [(value, nodes.tensor_type(value).rank - 1) for value in _added(head) if nodes.tensor_type(value).rank]
        seen |= {head.linear, *head.tail}
    seen |= {*tokens.lookups}
    while starts:
        value, dim = starts.pop()
        if nodes.tensor_type(value).shape[dim] == 1:  # a value that all ids share
            continue
        if nodes.tensor_type(value).shape[dim] != size:
            return f"'{value.name}' has blocks of several ids"
        if value.op == "get_attr":
            if selected.setdefault(value, dim) != dim:
                return f"'{value.target}' holds ids in two dimensions"
        elif (below := _operands(value, dim)) is None:
            return f"'{value.name}' is computed from weights in a form whose rows cannot be told"
        else:
            starts += below
        seen.add(value)
    other = next((user for value in selected for user in value.users if user not in seen), None)
    return selected if other is None else f"'{other.name}' reads the same weight for another purpose"


def _added(head: Head) -> list[fx.Node]:
    """The bias of a head, and the weights that its tail reads."""
    product = AddedProduct.of(head.linear)
    bias = nodes.argument(head.linear, "bias") if product is None and head.linear.target is aten.linear.default else None
    added = [bias] if product is None else [product.bias]
    read = [used for node in head.tail for used in node.all_input_nodes if used.op == "get_attr"]
    return [value for value in (*added, *read) if isinstance(value, fx.Node)]


def _operands(value: fx.Node, dim: int) -> list[tuple[fx.Node, int]] | None:
    """The operands of a call that hold ids, with their dimensions; None for a call that mixes rows."""
    rank = nodes.tensor_type(value).rank
    if nodes.is_call(value, *ops.TRANSPOSES) and rank == 2:
        return [(nodes.operand(value), 1 - dim)]
    if nodes.is_call(value, *ops.CASTS, *ops.IDENTITIES):
        return [(nodes.operand(value), dim)]
    quantized = Dequantize.of(value)
    if quantized is None and not nodes.is_call(value, fake_quantize):
        return None
    packed = quantized is not None and FORMATS[quantized.format].bits == 4 and dim == rank - 1
    return None if packed else [(used, dim) for used in value.all_input_nodes if nodes.tensor_type(used).rank]


def remove_ids(edit: Editor, tokens: TokenIds, selected: Selected, kept: torch.Tensor) -> None:
    """Remove the rows of ids that are never looked up and whose logits are masked.

    Args:
        kept: the ids that stay, ascending.
    """
    new = torch.full((tokens.size,), -1, dtype=torch.int64)
    new[kept] = torch.arange(len(kept))
    for weight, dim in selected.items():
        tensor = edit.tensor(weight)
        edit.set_weight(weight, edit.like(weight, tensor.index_select(dim, kept.to(tensor.device))), retype=False)
        edit.rewritten += 1
    for lookup in tokens.lookups:
        padding = nodes.argument(lookup, "padding_idx")
        if isinstance(padding, int) and padding >= 0:
            nodes.set_argument(lookup, "padding_idx", int(new[padding]))
    mapped: dict[int, torch.Tensor] = {}
    for table in _id_tables(tokens):
        old = edit.tensor(table)
        edit.set_weight(table, mapped.setdefault(old.data_ptr(), new.to(old.device)[old]), retype=False)
    for head in tokens.heads:
        for mask in [user for user in head.logits.users if is_logit_mask(user)]:
            _scatter(edit, mask, head.logits, new)
    edit.retype_readers([*selected, *_id_tables(tokens)])


def _id_tables(tokens: TokenIds) -> list[fx.Node]:
    """The tables of ids that the lookups read, each tensor once."""
    found: dict[str, fx.Node] = {}
    for lookup in tokens.lookups:
        node = Embedding(lookup).ids
        while not is_id_table(node):
            node = nodes.operand(node)
        table = Embedding(node).table
        found.setdefault(str(table.target), table)
    return list(found.values())


def _scatter(edit: Editor, mask: fx.Node, logits: fx.Node, new: torch.Tensor) -> None:
    """Let a mask of logits be their expansion to all ids instead, -inf where an id was dropped."""
    places = torch.where(new < 0, int(new.max()) + 1, new).to(nodes.tensor_type(logits).device)
    with edit.before(mask):
        read = edit.weight("vocabulary.places", places)
        padded = edit.call(aten.constant_pad_nd.default, logits, [0, 1], -math.inf)
    mask.target = aten.index_select.default
    nodes.set_arguments(mask, padded, nodes.tensor_type(logits).rank - 1, read)


def reached_ids(edit: Editor, tokens: TokenIds) -> torch.Tensor | None:
    """The ids that are looked up or have logits, ascending; None if there is no table of ids."""
    lookups = [Embedding(lookup).ids for lookup in tokens.lookups]
    if not all(_is_mapped(ids) for ids in lookups):
        return None
    reached = torch.zeros(tokens.size, dtype=torch.bool)
    for table in _id_tables(tokens):
        rows = edit.tensor(table).flatten().cpu()
        reached[rows[rows < tokens.size]] = True  # those of dropped ids may be behind the last
    for head in tokens.heads:
        masks = [user for user in head.logits.users if is_logit_mask(user)]
        if not masks or len(masks) < len(head.logits.users):
            return None
        for mask in masks:
            dropped = nodes.argument(mask, "mask")
            assert isinstance(dropped, fx.Node)
            reached |= ~edit.tensor(dropped).cpu()
    return reached.nonzero().flatten()


def _is_mapped(ids: fx.Node) -> bool:
    """True if ids come out of a table of ids."""
    while ids.op == "call_function" and not is_id_table(ids):
        ids = nodes.operand(ids)
    return is_id_table(ids)
