"""Residual branches: what an attention or a feed-forward reads from the residual stream, and the sum that takes it back in.

pre-norm:   y = x + f(norm(x))          before: x   after: y
post-norm:  y = norm(x + f(x))          before: x   after: y, behind the norm
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from lissom.compiler import node as nodes
from lissom.compiler.attention_sites import AttentionSite
from lissom.compiler.feed_forward_sites import FeedForwardSite
from lissom.compiler.linears import NORMS, SHAPES, input_of, is_linear, is_pointwise, residual_of

_SUMS = 4
"""How many sums may lie between a branch and the stream, where several branches are added up first."""
_FAR = 12


@dataclass(frozen=True)
class Branch:
    """One branch.

    last: the linear layer that ends it. before, after: the residual stream before and after it. total: the sum.
    addend: the operand of the sum that is not the stream. post_norm: whether `after` is a norm of the sum.
    """

    last: fx.Node
    before: fx.Node
    total: fx.Node
    addend: fx.Node
    after: fx.Node

    @property
    def post_norm(self) -> bool:
        return self.after is not self.total


def branch_of(site: AttentionSite | FeedForwardSite) -> Branch | str:
    """The branch of a site, or why none can be told."""
    last = site.output if isinstance(site, AttentionSite) else site.down
    firsts = site.q if isinstance(site, AttentionSite) else site.up
    if last is None or not firsts:
        return "it has no layers that lead into it and out of it"
    behind = _behind(input_of(firsts[0]))
    total = site.residual
    for _ in range(_SUMS):
        if total is None:
            break
        for before, addend in (_operands(total), _operands(total)[::-1]):
            if (bare := _bare(before)) in behind:
                plain = not any(nodes.is_call(node, *NORMS) for node in behind[: behind.index(bare)])
                norm = _only_norm(total) if plain and not _norm_between(addend, last) else None
                return Branch(last, before, total, addend, norm or total)
        total = residual_of(total)
    return "the sum that takes it back into the residual stream cannot be told"


def follow(branches: Sequence[Branch]) -> bool:
    """True when each branch reads what the one before it leaves, or ends in the same sum, so that nothing lies between them."""
    pairs = zip(branches, branches[1:], strict=False)
    return all(_bare(later.before) is _bare(earlier.after) or later.total is earlier.total for earlier, later in pairs)


def _operands(total: fx.Node) -> tuple[fx.Node, fx.Node]:
    left, right = total.all_input_nodes if len(total.all_input_nodes) == 2 else total.all_input_nodes * 2
    return left, right


def _bare(node: fx.Node) -> fx.Node:
    """The value before shapes and casts."""
    while nodes.is_call(node, *SHAPES) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _behind(node: fx.Node) -> list[fx.Node]:
    """The value and those it was before shapes, casts and norms were applied to it, nearest first."""
    found = [node]
    while nodes.is_call(node, *SHAPES, *NORMS) and node.all_input_nodes:
        node = node.all_input_nodes[0]
        found.append(node)
    return found


def _only_norm(total: fx.Node) -> fx.Node | None:
    """The norm that alone reads a sum."""
    users = list(total.users)
    return users[0] if len(users) == 1 and nodes.is_call(users[0], *NORMS) else None


def _norm_between(addend: fx.Node, last: fx.Node) -> bool:
    """True when the branch is normed before it is added, as in Gemma and OLMo 2."""
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
