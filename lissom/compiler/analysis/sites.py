"""Assigns every call of a program to one site: an attention, feed-forward, embedding, norm or other part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from lissom.compiler.analysis.flops import is_counted
from lissom.compiler.analysis.structure.linear import is_linear
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir.match import computed_from
from lissom.compiler.ir.program import Program


@dataclass(frozen=True)
class Site:
    """A part of a program.

    Attributes:
        kind: `attention`, `cross-attention`, `feed-forward`, `convolution`, `embedding`, `norm`, `LM head`; then `product` for
            matrix products in none of these, and `other`.
        layer: the module path of its layer; empty for all kinds but attentions and feed-forwards.
        nodes: its calls, in the order of the graph.
    """

    kind: str
    layer: str
    nodes: tuple[fx.Node, ...]


def sites(program: Program) -> tuple[Site, ...]:
    """The sites of a program, which together hold every call once; use it as `program.fact(sites)`.

    Attentions and feed-forwards come first, in the order of the graph. Each holds its projections and the calls between them
    and its last layer. Masks, position tables and residual adds are `other`.
    """
    transformer = program.fact(structure)
    order = {node: index for index, node in enumerate(program.nodes())}
    claims: list[tuple[str, str, set[fx.Node]]] = []
    for layer in transformer.layers:
        for site in layer.attention:
            kind = "cross-attention" if site.cross else "attention"
            claims.append((kind, layer.path, _between((*site.q, *site.k, *site.v, site.node), site.output or site.node, order)))
        claims += [("feed-forward", layer.path, _between(site.up, site.down, order)) for site in layer.feed_forward]
    claims.sort(key=lambda claim: min(order[node] for node in claim[2]))
    kinds = {
        "convolution": transformer.convolutions,
        "embedding": [embedding.node for embedding in transformer.embeddings],
        "norm": transformer.norms,
        "LM head": transformer.lm_heads,
        "product": [node for node in order if is_counted(node)],
        "other": order,
    }
    claims += [(kind, "", set(members)) for kind, members in kinds.items()]
    claimed: set[fx.Node] = set()
    assigned: list[Site] = []
    for kind, layer, members in claims:
        if mine := members - claimed:
            assigned.append(Site(kind, layer, tuple(sorted(mine, key=order.__getitem__))))
        claimed |= mine
    return tuple(assigned)


def _between(firsts: Iterable[fx.Node], last: fx.Node, order: dict[fx.Node, int]) -> set[fx.Node]:
    """The first calls, the last, and the calls between them, not through another linear layer."""
    before = computed_from([last], lambda node: node is last or not is_linear(node))
    reached = {last, *firsts}
    for node in sorted(order.keys() & before, key=order.__getitem__):
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached
