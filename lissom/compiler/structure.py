"""The transformer seen in a program: attention and feed-forward sites, layers, norms, embeddings, output heads.

Sites are found from what the operators do, not from what the author called them: an attention is a
`scaled_dot_product_attention` with the projections that feed and follow it, a feed-forward is a linear layer fed by an
activation of linear layers of the same input. Module paths serve only to say where a site is and which layer it belongs to.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler import node as nodes
from lissom.compiler.layers import in_order, layer_paths
from lissom.compiler.masks import MaskKind, mask_kind
from lissom.compiler.program import Program
from lissom.compiler.types import ScalarType

aten = torch.ops.aten

LINEAR = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.conv1d.default, aten.conv2d.default}
"""Operators that multiply with a weight. A `matmul` with a weight counts too."""
ATTENTION = {"aten.scaled_dot_product_attention.default", "lissom.attention.default"}
"""Attention operators, by name."""
NORMS = {aten.layer_norm.default, aten.rms_norm.default, aten.batch_norm.default, aten.group_norm.default}
_AFFINE = {
    "add", "sub", "rsub", "mul", "div", "neg", "clone", "where", "masked_fill", "copy", "detach", "alias", "minimum", "maximum",
    "bitwise_not", "logical_not", "bitwise_and", "logical_and", "eq", "ne", "lt", "le", "gt", "ge",
}  # fmt: skip
"""Point-wise operators that are no activation by themselves."""
_WEIGHT_VIEWS = (aten.t.default, aten.transpose.int, aten.permute.default, aten.reshape.default, aten.to.dtype)
_SHAPES = {
    aten.reshape.default,
    aten.view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.contiguous.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.expand.default,
    aten.repeat_interleave.self_int,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.to.dtype,
    aten._to_copy.default,
    aten.dropout.default,
}


@dataclass(frozen=True)
class AttentionSite:
    """One attention.

    node: the attention operator. q, k, v, output: the layers that project into it and out of it; empty where there are none.
    packed: whether q, k and v come from one layer. cross: whether k and v come from other tokens than q.
    heads, key_value_heads, head_dim: sizes. scale: the factor on the scores, None for 1/√head_dim.
    mask: what the mask does. positions: `rotary`, `relative` (a bias learnt or computed per distance), or `none here`.
    """

    node: fx.Node
    q: tuple[fx.Node, ...]
    k: tuple[fx.Node, ...]
    v: tuple[fx.Node, ...]
    output: fx.Node | None
    packed: bool
    cross: bool
    heads: int
    key_value_heads: int
    head_dim: int
    scale: float | None
    mask: MaskKind
    positions: str

    @property
    def path(self) -> str:
        return nodes.origin(self.node).module_path


@dataclass(frozen=True)
class FeedForwardSite:
    """One feed-forward: down(activation(up(x))), or down(activation(gate(x)) · up(x)) when gated.

    up: the layers read first, one or two; gated: whether one multiplies the other. width: features between up and down.
    """

    up: tuple[fx.Node, ...]
    activations: tuple[fx.Node, ...]
    down: fx.Node
    gated: bool
    width: int

    @property
    def path(self) -> str:
        return nodes.origin(self.down).module_path


@dataclass(frozen=True)
class Embedding:
    """A table of rows looked up by number. tied: whether an output head multiplies with the same weight."""

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
    """Everything found in a program, in the order of the graph."""

    attention: tuple[AttentionSite, ...]
    feed_forward: tuple[FeedForwardSite, ...]
    routers: tuple[fx.Node, ...]
    layers: tuple[Layer, ...]
    norms: tuple[fx.Node, ...]
    embeddings: tuple[Embedding, ...]
    output_heads: tuple[fx.Node, ...]
    convolutions: tuple[fx.Node, ...]


def structure(program: Program) -> Structure:
    """The transformer in a program; ask for it as `program.fact(structure)`."""
    rotary = _reached_from(program, {aten.cos.default, aten.sin.default, aten.polar.default})
    attention = tuple(_attention_site(program, node, rotary) for node in program.nodes() if is_attention(node))
    projections = {used for site in attention for used in (*site.q, *site.k, *site.v)}
    feed_forward = tuple(
        site for node in program.nodes() if is_linear(node) and (site := _feed_forward_site(node, projections)) is not None
    )
    embeddings = program.nodes(aten.embedding.default)
    tables = {node.all_input_nodes[0] for node in embeddings}
    linears = [node for node in program.nodes() if is_linear(node)]
    return Structure(
        attention=attention,
        feed_forward=feed_forward,
        routers=tuple(node for node in program.nodes(aten.topk.default) if _producers(node.args[0])),
        layers=_layers(attention, feed_forward),
        norms=tuple(program.nodes(*NORMS)),
        embeddings=tuple(_embedding(node, linears) for node in embeddings),
        output_heads=tuple(node for node in linears if weight_of(node) in tables or _reaches_output(program, node)),
        convolutions=tuple(program.nodes(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)),
    )


def is_attention(node: fx.Node) -> bool:
    """True for an attention operator: PyTorch's, or ours with soft-capped scores and sinks."""
    return str(node.target) in ATTENTION


def is_linear(node: fx.Node) -> bool:
    """True for a product with a weight: linear, addmm, a convolution, or a matmul whose second factor is a weight."""
    return weight_of(node) is not None


def weight_of(node: fx.Node) -> fx.Node | None:
    """The weight a linear layer multiplies with, seen through views and casts; None when the node is no linear layer."""
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        found = node.args[2]
    elif node.target in LINEAR or node.target in (aten.matmul.default, aten.bmm.default):
        found = node.args[1]
    else:
        return None
    while nodes.is_call(found, *_WEIGHT_VIEWS):
        found = found.args[0]
    return found if isinstance(found, fx.Node) and found.op == "get_attr" else None


def input_of(linear: fx.Node) -> fx.Node:
    """What a linear layer reads."""
    index = 1 if linear.target in (aten.addmm.default, aten.baddbmm.default) else 0
    found = linear.args[index]
    assert isinstance(found, fx.Node)
    return found


def _producers(start: object, through: frozenset[object] | None = None) -> tuple[fx.Node, ...]:
    """The linear layers a value comes from, nearest first, without passing through another one or an attention."""
    found: dict[fx.Node, None] = {}
    pending, seen = [start], set()
    while pending:
        node = pending.pop(0)
        if not isinstance(node, fx.Node) or node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if is_linear(node):
            found[node] = None
        elif not is_attention(node) and (through is None or node.target in through):
            pending += node.all_input_nodes
    return tuple(found)


def _attention_site(program: Program, node: fx.Node, rotary: set[fx.Node]) -> AttentionSite:
    q, k, v = (_producers(item) for item in node.args[:3])
    types = [nodes.tensor_type(item) for item in node.args[:3]]
    query_sources = {_source(input_of(item)) for item in q}
    cross = bool(k) and query_sources.isdisjoint({_source(input_of(item)) for item in k})
    heads, groups = (_int(found.shape[-3]) if found.rank > 2 else 1 for found in types[:2])
    scale = nodes.argument(node, "scale")
    mask = mask_kind(program, node)
    between = _between(node.args[0], q)
    positions = "rotary" if between & rotary or _takes(between, rotary) else "relative" if mask.bias else "none here"
    return AttentionSite(
        node=node,
        q=q,
        k=k,
        v=v,
        output=_consumer(node),
        packed=len({*q, *k, *v}) == 1 and bool(q),
        cross=cross,
        heads=heads,
        key_value_heads=_shared_groups(node, groups),
        head_dim=_int(types[0].shape[-1]),
        scale=float(scale) if isinstance(scale, (int, float)) else None,
        mask=mask,
        positions=positions,
    )


def _shared_groups(attention: fx.Node, heads: int) -> int:
    """The key/value heads before they were repeated for the query heads that share them."""
    node = attention.args[1]
    while nodes.is_call(node, *_SHAPES, aten.repeat.default):
        source = node.args[0]
        if nodes.is_call(node, aten.repeat_interleave.self_int):
            return heads // int(node.args[1])  # pyright: ignore[reportArgumentType]
        if nodes.is_call(node, aten.expand.default) and nodes.is_tensor(source):
            old, new = nodes.tensor_type(source).shape, nodes.tensor_type(node).shape
            grown = [size for size, before in zip(new, old, strict=False) if before == 1 and size != 1]
            if len(old) == len(new) == 5 and grown and isinstance(grown[0], int) and heads % grown[0] == 0:
                return heads // grown[0]
        node = source
    return heads


def _source(node: fx.Node) -> fx.Node:
    """A value before shapes, casts and norms were applied to it, so that two readers of it are seen to read the same."""
    while nodes.is_call(node, *_SHAPES, *NORMS) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _between(start: object, ends: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes between a value and the layers it comes from."""
    found: set[fx.Node] = set()
    pending = [start]
    while pending:
        node = pending.pop()
        if isinstance(node, fx.Node) and node.op == "call_function" and node not in found and node not in ends:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _takes(found: set[fx.Node], rotary: set[fx.Node]) -> bool:
    return any(not rotary.isdisjoint(node.all_input_nodes) for node in found)


def _consumer(node: fx.Node) -> fx.Node | None:
    """The first linear layer that reads a value through shapes, casts, gates and norms."""
    frontier, seen = list(node.users), set()
    for _ in range(24):
        following: list[fx.Node] = []
        for user in frontier:
            if is_linear(user):
                return user
            passes = user.target in _SHAPES or user.target in NORMS or _is_pointwise(user)
            if passes and user not in seen:
                seen.add(user)
                following += user.users
        frontier = following
    return None


def _feed_forward_site(down: fx.Node, projections: set[fx.Node]) -> FeedForwardSite | None:
    """The feed-forward that ends in this layer, if one does: an activation of one or two layers that read one value."""
    between: list[fx.Node] = []
    up: dict[fx.Node, None] = {}
    pending, seen = [input_of(down)], set()
    while pending:
        node = pending.pop(0)
        if node in seen or node.op != "call_function" or isinstance(nodes.node_type(node), ScalarType):
            continue
        seen.add(node)
        if is_linear(node):
            up[node] = None
            continue
        if not (_is_pointwise(node) or node.target in _SHAPES or node.target is operator.getitem):
            return None
        between.append(node)
        pending += node.all_input_nodes
    activations = tuple(node for node in between if _is_activation(node))
    products = any(_multiplies_values(node) for node in between) or len(up) == 2
    if not (activations or products) or not 1 <= len(up) <= 2 or projections.intersection(up) or down in projections:
        return None
    if len({_source(input_of(node)) for node in up}) > 1 or _features(down, 0) != _features(next(iter(up)), 1):
        return None
    return FeedForwardSite(tuple(up), activations, down, products, _features(down, 1))


def _multiplies_values(node: fx.Node) -> bool:
    """True for a product of two values where neither is a function of the other alone (x · sigmoid(x) is one activation)."""
    if not nodes.is_call(node, aten.mul.Tensor) or len(node.all_input_nodes) != 2:
        return False
    pieces = (operator.getitem, aten.slice.Tensor)
    return any(nodes.is_call(used, *pieces) for used in node.all_input_nodes)


def _is_activation(node: fx.Node) -> bool:
    return _is_pointwise(node) and str(node.target).split(".")[1] not in _AFFINE


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _features(linear: fx.Node, side: int) -> int:
    """Features a linear layer gives (side 0) or takes (side 1)."""
    weight = weight_of(linear)
    assert weight is not None
    shape = nodes.tensor_type(weight).shape
    if linear.target in (aten.linear.default, aten.conv1d.default, aten.conv2d.default):
        return _int(shape[side])
    value = nodes.tensor_type(linear if side == 0 else input_of(linear)).shape[-1]
    return _int(value)


def _embedding(node: fx.Node, linears: Iterable[fx.Node]) -> Embedding:
    table = node.args[0]
    rows, width = nodes.tensor_type(table).shape
    return Embedding(node, _int(rows), _int(width), any(weight_of(linear) is table for linear in linears))


def _reaches_output(program: Program, linear: fx.Node) -> bool:
    """True when a layer's result goes to the output through shapes, casts and activations alone."""
    node = linear
    for _ in range(8):
        users = list(node.users)
        if program.output in users:
            return True
        if len(users) != 1 or not (users[0].target in _SHAPES or _is_activation(users[0])):
            return False
        node = users[0]
    return False


def _reached_from(program: Program, targets: set[object]) -> set[fx.Node]:
    """The nodes computed from a call of one of the targets without a linear layer or an attention between."""
    found: set[fx.Node] = set()
    for node in program.nodes():
        if is_linear(node) or is_attention(node):
            continue
        if node.target in targets or any(used in found for used in node.all_input_nodes if not _mixes(node, found)):
            found.add(node)
    return found


def _mixes(node: fx.Node, found: set[fx.Node]) -> bool:
    """True where a table of angles is applied to a value: the result is no table any more."""
    others = [
        used for used in node.all_input_nodes if used not in found and used.op == "call_function" and nodes.is_tensor(used)
    ]
    return bool(others)


def _layers(attention: Sequence[AttentionSite], feed_forward: Sequence[FeedForwardSite]) -> tuple[Layer, ...]:
    """Sites grouped by layer, in the order of the layers' paths."""
    of_attention, of_feed_forward = layer_paths([site.path for site in attention], [site.path for site in feed_forward])
    held: dict[str, tuple[list[AttentionSite], list[FeedForwardSite]]] = defaultdict(lambda: ([], []))
    for path, site in zip(of_attention, attention, strict=True):
        held[path][0].append(site)
    for path, site in zip(of_feed_forward, feed_forward, strict=True):
        held[path][1].append(site)
    return tuple(Layer(path, tuple(held[path][0]), tuple(held[path][1])) for path in sorted(held, key=in_order))


def _int(size: object) -> int:
    return size if isinstance(size, int) else -1
