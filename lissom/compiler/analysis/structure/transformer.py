"""The transformer structure of a program: attention and feed-forward sites, layers, norms, embeddings, LM heads.

Sites are found by their operators, not by module names: an attention is a `scaled_dot_product_attention` with its input and
output projections; a feed-forward is a linear layer after an activation of linear layers with the same input. Module paths
only give the place and the layer of a site.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.structure.attention import AttentionSite, attention_site
from lissom.compiler.analysis.structure.feed_forward import FeedForwardSite, MixtureSite, feed_forward_site, mixture_site
from lissom.compiler.analysis.structure.layers import in_order, layers_of
from lissom.compiler.analysis.structure.linear import as_int, is_attention, is_id_table, is_linear, weight_of
from lissom.compiler.ir import calls
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import CONVOLUTIONS, NORMS, SHAPES, is_activation
from lissom.compiler.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Embedding:
    """An embedding table.

    Attributes:
        tied: whether an LM head uses the same weight.
    """

    node: fx.Node
    rows: int
    width: int
    tied: bool


@dataclass(frozen=True)
class Layer:
    """The sites of one layer, by the module path they share."""

    path: str
    attention: tuple[AttentionSite, ...]
    feed_forward: tuple[FeedForwardSite, ...]


@dataclass(frozen=True)
class Structure:
    """The structure of a program, each field in the order of the graph.

    Attributes:
        lm_heads: the linear layers that make an output of the program, classifiers included, and those tied to an embedding
            table.
    """

    attention: tuple[AttentionSite, ...]
    feed_forward: tuple[FeedForwardSite, ...]
    mixtures: tuple[MixtureSite, ...]
    layers: tuple[Layer, ...]
    norms: tuple[fx.Node, ...]
    embeddings: tuple[Embedding, ...]
    lm_heads: tuple[fx.Node, ...]
    convolutions: tuple[fx.Node, ...]

    @property
    def residuals(self) -> list[fx.Node]:
        """The residual adds, each once."""
        sums = (site.residual for site in (*self.attention, *self.feed_forward))
        return list(dict.fromkeys(residual for residual in sums if residual is not None))


def structure(program: Program) -> Structure:
    """The transformer structure of a program; use it as `program.fact(structure)`."""
    rotary = _reached_from(program, {aten.cos.default, aten.sin.default, aten.polar.default})
    attention = tuple(attention_site(program, node, rotary) for node in program.nodes() if is_attention(node))
    projections = {used for site in attention for used in (*site.q, *site.k, *site.v)}
    feed_forward = tuple(
        site for node in program.nodes() if is_linear(node) and (site := feed_forward_site(node, projections)) is not None
    )
    embeddings = [node for node in program.nodes(aten.embedding.default) if not is_id_table(node)]
    tables = {calls.Embedding(node).table for node in embeddings}
    linears = [node for node in program.nodes() if is_linear(node)]
    return Structure(
        attention=attention,
        feed_forward=feed_forward,
        mixtures=tuple(site for node in program.nodes(aten.topk.default) if (site := mixture_site(node)) is not None),
        layers=_layers(attention, feed_forward),
        norms=tuple(program.nodes(*NORMS)),
        embeddings=tuple(_embedding(node, linears) for node in embeddings),
        lm_heads=tuple(node for node in linears if weight_of(node) in tables or _reaches_output(program, node)),
        convolutions=tuple(program.nodes(*CONVOLUTIONS)),
    )


def _embedding(node: fx.Node, linears: Iterable[fx.Node]) -> Embedding:
    table = calls.Embedding(node).table
    rows, width = nodes.tensor_type(table).shape
    return Embedding(node, as_int(rows), as_int(width), tied=any(weight_of(linear) is table for linear in linears))


def _reaches_output(program: Program, linear: fx.Node) -> bool:
    """True when a layer's result reaches the output through views, casts and element-wise operators of one input only."""
    node = linear
    for _ in range(8):
        users = list(node.users)
        if program.output in users:
            return True
        if len(users) != 1 or not (users[0].target in SHAPES or _is_scaled(users[0], node) or is_activation(users[0])):
            return False
        node = users[0]
    return False


def _is_scaled(node: fx.Node, value: fx.Node) -> bool:
    """True for a value times or over a number, as logits are before and after a soft cap."""
    return nodes.is_call(node, aten.mul.Tensor, aten.div.Tensor) and node.all_input_nodes == [value]


def _reached_from(program: Program, targets: set[object]) -> set[fx.Node]:
    """The nodes that depend on a call of one of the targets, without a linear layer or an attention between."""
    reached: set[fx.Node] = set()
    for node in program.nodes():
        if is_linear(node) or is_attention(node):
            continue
        # A table applied to a computed value is no table any more.
        inputs = node.all_input_nodes
        values = [used for used in inputs if used not in reached and used.op == "call_function" and nodes.is_tensor(used)]
        if node.target in targets or (not values and not reached.isdisjoint(inputs)):
            reached.add(node)
    return reached


def _layers(attention: Sequence[AttentionSite], feed_forward: Sequence[FeedForwardSite]) -> tuple[Layer, ...]:
    """The layers, in the order of their paths; the sites of each in the order of the graph."""
    held, layers = layers_of(attention, feed_forward), list[Layer]()
    for path in sorted(held, key=in_order):
        inside = set(map(id, held[path]))
        attentions = tuple(site for site in attention if id(site) in inside)
        layers.append(Layer(path, attentions, tuple(site for site in feed_forward if id(site) in inside)))
    return tuple(layers)
