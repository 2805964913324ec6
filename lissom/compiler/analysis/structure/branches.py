"""Residual branches: the input of an attention or a feed-forward in the residual stream, and its residual add.

pre-norm:   y = x + f(norm(x))          before: x   after: y
post-norm:  y = norm(x + f(x))          before: x   after: y, after the norm
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import fx

from lissom.compiler.analysis.structure.attention import AttentionSite
from lissom.compiler.analysis.structure.feed_forward import FeedForwardSite
from lissom.compiler.analysis.structure.linear import input_of, is_linear, is_quantizer, last_factor, residual_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import NORMS, SHAPES, is_pointwise

aten = torch.ops.aten

_SUMS = 4
"""The most sums between a branch and the residual stream, where several branches are added up first."""
_FAR = 12


@dataclass(frozen=True)
class Branch:
    """One residual branch.

    Attributes:
        last: the linear layer that ends it.
        before: the residual stream before it.
        after: the residual stream after it.
        total: the first sum after it, of `addend`, the branch's output, and `rest`. For parallel branches it is the sum of two
            of them; otherwise it is the residual add, and `rest` is `before`.
        post_norm: whether `after` is a norm of the residual add.
    """

    last: fx.Node
    before: fx.Node
    after: fx.Node
    total: fx.Node
    addend: fx.Node
    rest: fx.Node
    post_norm: bool


def branch_of(site: AttentionSite | FeedForwardSite) -> Branch | str:
    """The branch of a site, or the reason why it cannot be found."""
    last = site.output if isinstance(site, AttentionSite) else site.down
    firsts = site.q if isinstance(site, AttentionSite) else site.up
    if last is None or not firsts:
        return "it has no input and output projections"
    last = last_factor(last)
    behind = _behind(input_of(firsts[0]))
    total = stream = site.residual
    for _ in range(_SUMS):
        if total is None or stream is None:
            break
        for before in _terms(stream):
            if (bare := _bare(before)) in behind:
                addend, rest = _operands(total, last)
                normed = None
                if _is_plain(behind[: behind.index(bare)]) and not _norm_between(addend, last):
                    normed = _only_norm(stream)
                return Branch(last, before, normed or stream, total, addend, rest, normed is not None)
        stream = residual_of(stream)
    return "its residual add cannot be found"


def joined(branches: Sequence[Branch]) -> list[Branch]:
    """The branches, with one stream after those that are added one after the other, y = (x + f(x)) + g(x)."""
    chained = list(branches)
    for later in reversed(chained):
        for index, earlier in enumerate(chained):
            if later.rest is earlier.total is not later.total and _bare(earlier.before) is _bare(later.before):
                chained[index] = replace(earlier, after=later.after)
    return chained


def follow(branches: Sequence[Branch]) -> bool:
    """True when each branch reads the output of the one before it, or ends in the same sum, with nothing in between."""
    pairs = pairwise(branches)
    return all(_bare(later.before) is _bare(earlier.after) or later.after is earlier.after for earlier, later in pairs)


def _operands(total: fx.Node, last: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The operand of a sum that comes from the layer, and the other operand."""
    node = last
    while total not in node.users:
        (node,) = node.users
    return node, next((operand for operand in total.all_input_nodes if operand is not node), node)


def _bare(node: fx.Node) -> fx.Node:
    """The value before views and casts."""
    while nodes.is_call(node, *SHAPES) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _terms(total: fx.Node) -> list[fx.Node]:
    """The terms of a sum, nearest first; those of sums in it too."""
    terms = list(total.all_input_nodes)
    level = terms
    for _ in range(_SUMS):
        level = [term for node in level if nodes.is_call(node, aten.add.Tensor) for term in node.all_input_nodes]
        terms += level
    return terms


def _behind(node: fx.Node) -> list[fx.Node]:
    """The value and its origins before views, casts, norms and factors of a linear layer, nearest first."""
    origins = [node]
    while True:
        if is_linear(node):
            node = input_of(node)
        elif (
            nodes.is_call(node, *SHAPES, *NORMS, aten.constant_pad_nd.default) or is_quantizer(node)
        ) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        else:
            return origins
        origins.append(node)


def _is_plain(between: Sequence[fx.Node]) -> bool:
    """True when no norm stands before the first linear layer of a branch; the calls from that layer's side."""
    for node in reversed(between):
        if nodes.is_call(node, *NORMS):
            return False
        if is_linear(node):
            return True
    return True


def _only_norm(stream: fx.Node) -> fx.Node | None:
    """The norm that alone reads a value, or the slice after it where `prune-hidden` padded its input."""
    users = list(stream.users)
    padded = len(users) == 1 and nodes.is_call(users[0], aten.constant_pad_nd.default)
    if padded:
        users = list(users[0].users)
    if len(users) != 1 or not nodes.is_call(users[0], *NORMS):
        return None
    after = list(users[0].users)
    return (after[0] if len(after) == 1 and nodes.is_call(after[0], aten.slice.Tensor) else None) if padded else users[0]


def _norm_between(addend: fx.Node, last: fx.Node) -> bool:
    """True when the branch has a norm before the residual add, as in Gemma and OLMo 2."""
    node = addend
    for _ in range(_FAR):
        if node is last or is_linear(node):
            return False
        if nodes.is_call(node, *NORMS):
            return True
        if not (nodes.is_call(node, *SHAPES) or is_pointwise(node)) or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False
