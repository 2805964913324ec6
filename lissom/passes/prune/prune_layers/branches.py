"""Residual branches: the input of an attention or a feed-forward in the residual stream, and its residual add.

pre-norm:   y = x + f(norm(x))          before: x   after: y
post-norm:  y = norm(x + f(x))          before: x   after: y, after the norm
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from lissom.compiler.analysis.structure.attention import AttentionSite
from lissom.compiler.analysis.structure.feed_forward import FeedForwardSite
from lissom.compiler.analysis.structure.linear import SHAPES, input_of, is_linear, residual_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import NORMS, is_pointwise

_SUMS = 4
"""The most sums between a branch and the residual stream, where several branches are added up first."""
_FAR = 12


@dataclass(frozen=True)
class Branch:
    """One residual branch.

    last: the linear layer that ends it. before, after: the residual stream before and after it.
    total: the first sum after it, of `addend`, the branch's output, and `rest`. For parallel branches it is the sum of two of
        them; otherwise it is the residual add, and `rest` is `before`.
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
    behind = _behind(input_of(firsts[0]))
    total = stream = site.residual
    for _ in range(_SUMS):
        if total is None or stream is None:
            break
        for before in stream.all_input_nodes:
            if (bare := _bare(before)) in behind:
                addend, rest = _operands(total, last)
                plain = not any(nodes.is_call(node, *NORMS) for node in behind[: behind.index(bare)])
                users = list(stream.users)
                normed = plain and not _norm_between(addend, last) and len(users) == 1 and nodes.is_call(users[0], *NORMS)
                return Branch(last, before, users[0] if normed else stream, total, addend, rest, normed)
        stream = residual_of(stream)
    return "its residual add cannot be found"


def follow(branches: Sequence[Branch]) -> bool:
    """True when each branch reads the output of the one before it, or ends in the same sum, with nothing in between."""
    pairs = pairwise(branches)
    return all(_bare(later.before) is _bare(earlier.after) or later.after is earlier.after for earlier, later in pairs)


def _operands(total: fx.Node, last: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The operand of a sum that comes from the layer, and the other operand."""
    node = last
    while total not in node.users:
        (node,) = node.users
    return node, next((item for item in total.all_input_nodes if item is not node), node)


def _bare(node: fx.Node) -> fx.Node:
    """The value before views and casts."""
    while nodes.is_call(node, *SHAPES) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _behind(node: fx.Node) -> list[fx.Node]:
    """The value and its origins before views, casts and norms, nearest first."""
    found = [node]
    while nodes.is_call(node, *SHAPES, *NORMS) and node.all_input_nodes:
        node = node.all_input_nodes[0]
        found.append(node)
    return found


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
