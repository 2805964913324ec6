"""The axes that tensor parallelism shards: heads, neurons and vocabularies, found in the program's structure.

Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, §3): queries, keys, values, up and gate column-wise, output and down
row-wise, embeddings and LM heads by vocabulary. A site is a set of atomic axes with the number of shards of each. The axes
analysis knows where they occur: in weights, scales, attention biases and state.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.axes.axes import Axes, axes
from lissom.compiler.analysis.axes.axis import Axis, sizes_of
from lissom.compiler.analysis.axes.columns import feature_dim
from lissom.compiler.analysis.structure.attention import AttentionSite
from lissom.compiler.analysis.structure.linear import input_of, is_linear, is_quantizer, residual_of, weight_of
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention, Embedding, GroupedProduct
from lissom.compiler.ir.match import computed_from
from lissom.compiler.ir.operators import SHAPES, is_pointwise
from lissom.compiler.ir.placement import Span, Spans
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import Size, fixed
from lissom.compiler.parallel.rules.joint import CHOICES, joint_dim
from lissom.ops import grouped_product

aten = torch.ops.aten

ShardedAxes = Mapping[Axis, tuple[int, int, int]]


@dataclass(frozen=True)
class ShardSite:
    """A part of a program that can be sharded.

    Attributes:
        kind: `attention`, `feed-forward`, `experts`, `embedding`, `LM head`, `mixer`; `layer` for one the user names, `gathered
            layer` and `summed layer` for one that is sharded by itself.
        node: the operator it is reported at.
        path: its module.
        sharded_axes: the atomic axes, each with its number of shards and the number of neighbouring ranks that hold the same
            shard.
        obstacle: why it is not sharded; None where it is.
        weight: the weight of a layer that is sharded by itself; `sharded_axes` is empty then.
        dim: its sharded dimension.
    """

    kind: str
    node: fx.Node
    path: str
    sharded_axes: Mapping[Axis, tuple[int, int]]
    obstacle: str | None = None
    weight: fx.Node | None = None
    dim: int = 0


def shard_sites(program: Program, world_size: int, layers: Mapping[fx.Node, str]) -> list[ShardSite]:
    """The sites of a program on `world_size` ranks.

    Args:
        layers: linear layers the user names, each `column-wise` or `row-wise`.
    """
    program_axes, facts = program.fact(axes), program.fact(structure)
    sites = [_attention(program_axes, site, world_size) for site in facts.attention]
    grouped = [node for node in program.nodes() if node.target is grouped_product]
    for site in facts.feed_forward:
        if site.down in grouped:
            continue
        inside = [(input_of(site.down), feature_dim(site.down)), *((up, feature_dim(up)) for up in site.up)]
        sites.append(_whole("feed-forward", site.down, [program_axes.axis(*place) for place in inside], world_size))
    for node in grouped:
        x = GroupedProduct(node).x
        if not set(grouped).isdisjoint(computed_from([x], _moves_or_maps)):
            sites.append(_whole("experts", node, [program_axes.axis(x, -1)], world_size))
    for embedding in facts.embeddings:
        if embedding.rows >= embedding.width and (_is_vocabulary(embedding.node) or embedding.tied):
            sites.append(
                _whole("embedding", embedding.node, [program_axes.axis(Embedding(embedding.node).table, 0)], world_size)
            )
    site_nodes = {site.node for site in sites}
    scored = [node for node, _ in linear_layers(program) if is_linear(node) and _is_scored(node)]
    inside = {node for site in facts.attention for node in (*site.q, *site.k, *site.v, site.output)}
    for node in dict.fromkeys([*facts.lm_heads, *scored]):
        if node not in site_nodes and feature_dim(node) == -1 and node not in inside:
            sites.append(_whole("LM head", node, [program_axes.axis(node, -1)], world_size))
    for node, how in layers.items():
        axis = program_axes.axis(node, -1) if how == "column-wise" else program_axes.axis(input_of(node), -1)
        sites.append(_whole("layer", node, [axis], world_size))
    return sites


def mixer_sites(program: Program, world_size: int, layers: Collection[fx.Node]) -> list[ShardSite]:
    """The inner channels of recurrences and short convolutions: outputs of one of these layers and inputs of another.

    Mamba's inner channels are an example: projected in, convolved, run through the recurrence, and projected out. Channels of
    the residual stream do not count.

    Args:
        layers: linear layers that no other site shards.
    """
    program_axes = program.fact(axes)
    sums = [total for node, _ in linear_layers(program) if (total := residual_of(node)) is not None]
    stream = {atom.find() for total in sums for atom in program_axes.axis(total, -1).atoms()}
    given = {atom.find() for node in layers for atom in program_axes.axis(node, -1).atoms()} - stream
    sites: list[ShardSite] = []
    sharded = set[Axis]()
    for node in layers:
        site = _whole("mixer", node, [program_axes.axis(input_of(node), -1)], world_size)
        if site.sharded_axes and given.issuperset(site.sharded_axes) and not sharded.intersection(site.sharded_axes):
            sharded.update(site.sharded_axes)
            sites.append(site)
    return sites


def _whole(kind: str, node: fx.Node, axes: Sequence[Axis], world_size: int) -> ShardSite:
    """A site that shards the outermost atom of fixed size in each segment of these axes."""
    chosen: dict[Axis, tuple[int, int]] = {}
    path = nodes.origin(node).module_path
    for axis in axes:
        for segment in axis.segments():
            factors = [factor.find() for factor in segment.factors()]
            atom = next((factor for factor in factors if factor.form == "atom" and isinstance(factor.size, int)), None)
            if atom is None:
                return ShardSite(kind, node, path, {}, "its features are no axis of a fixed size")
            if fixed(atom.size) < world_size:
                return ShardSite(kind, node, path, {}, f"an axis of {atom.size} is too short for {world_size} ranks")
            chosen[atom] = world_size, 1
    return ShardSite(kind, node, path, chosen)


def _attention(program_axes: Axes, site: AttentionSite, world_size: int) -> ShardSite:
    """The site of an attention: its query heads, and the key/value heads they read."""
    shards = _head_shards(program_axes, site, world_size)
    if isinstance(shards, str):
        return ShardSite("attention", site.node, site.path, {}, shards)
    return ShardSite("attention", site.node, site.path, shards, "" if shards else "it has one head")


def _head_shards(program_axes: Axes, site: AttentionSite, world_size: int) -> dict[Axis, tuple[int, int]] | str:
    """The shards of an attention's heads, or why there are none."""
    if site.output is None or nodes.tensor_type(site.node).rank < 3:
        return "no layer projects its heads out"
    if feature_dim(site.output) != -1:
        return "its heads are projected out by a convolution"
    chosen: dict[Axis, tuple[int, int]] = {}
    attention = Attention(site.node)
    for operand in (attention.q, attention.k, attention.v):
        factors = _heads(program_axes.axis(operand, nodes.tensor_type(operand).rank - 3), site)
        if factors is None:
            return "its heads are no axis of their own"
        if factors and chosen.keys().isdisjoint(factors):
            parts = _shard_heads(factors, world_size)
            if parts is None:
                return f"{site.heads} heads are too few for {world_size} ranks"
            chosen |= parts
    return chosen


def _heads(axis: Axis, site: AttentionSite) -> list[Axis] | None:
    """The atoms of the heads, key/value groups first; empty for one head, None where heads are no axis of their own."""
    factors = [factor.find() for factor in axis.factors()]
    for first in range(len(factors) + 1):
        rest = factors[first:]
        if math.prod(sizes_of(rest)) in (site.heads, site.key_value_heads):
            return rest if all(factor.form == "atom" for factor in rest) else None
    return None


def _shard_heads(factors: Sequence[Axis], world_size: int) -> dict[Axis, tuple[int, int]] | None:
    """Shards the key/value groups, and with fewer groups than ranks also the heads in each group; None where that fails."""
    first, *more = factors
    size = fixed(first.size)
    if size >= world_size:
        return {first: (world_size, 1)}
    if more and world_size % size == 0 and fixed(more[0].size) % (world_size // size) == 0:
        return {first: (size, world_size // size), more[0]: (world_size // size, 1)}
    # Padded with zeros as long as more than half of the ranks have a head.
    enough = 2 * size > world_size or (math.prod(sizes_of(factors)) >= world_size and size > 1)
    return {first: (world_size, 1)} if enough else None


def _is_vocabulary(node: fx.Node) -> bool:
    """True for an embedding whose ids are a program input, possibly reshaped, cast or hashed by arithmetic with numbers."""
    ids = Embedding(node).ids
    while ids.op == "call_function":
        alone = is_pointwise(ids) and len(ids.all_input_nodes) == 1
        if not alone and ids.target not in SHAPES:
            return False
        ids = ids.all_input_nodes[0]
    return ids.op == "placeholder"


def _is_scored(node: fx.Node) -> bool:
    """True for a layer with more output than input features whose outputs are logits: argmax, top-k or softmax reads them."""
    features, read = (nodes.tensor_type(tensor).shape[-1] for tensor in (node, input_of(node)))
    if feature_dim(node) != -1 or not isinstance(features, int) or not isinstance(read, int) or features <= read:
        return False
    pending, seen = [node], set[fx.Node]()
    while pending:
        value = pending.pop()
        for user in value.users:
            if user.target in CHOICES and nodes.operand(user) is value:
                dim = joint_dim(user)
                if dim is not None and nodes.tensor_type(value).shape[dim] == features:
                    return True
            if user not in seen and (is_pointwise(user) or user.target in SHAPES):
                seen.add(user)
                pending.append(user)
    return False


def _moves_or_maps(node: fx.Node) -> bool:
    """True for element-wise operators, views, and items of several results."""
    return is_pointwise(node) or node.target in SHAPES or node.target is operator.getitem or is_quantizer(node)


def linear_layers(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """Every linear layer with its weight, including those of mixtures of experts, whose weights may be stacked."""
    layers: list[tuple[fx.Node, fx.Node]] = []
    for node in program.nodes():
        if (weight := weight_of(node)) is not None:
            layers.append((node, weight))
        elif (grouped := GroupedProduct.of(node)) is not None:
            weight = grouped.weight
            while weight.op == "call_function" and weight.all_input_nodes:
                weight = weight.all_input_nodes[0]
            layers.append((node, weight))
    return layers


def linear_weights(program: Program) -> dict[fx.Node, list[fx.Node]]:
    """The weights of linear layers with their layers, including mixtures of experts but not convolutions."""
    layers: dict[fx.Node, list[fx.Node]] = {}
    for node, weight in linear_layers(program):
        if feature_dim(node) == -1:
            layers.setdefault(weight, []).append(node)
    return layers


def spans_of(axis: Axis, sharded_axes: ShardedAxes) -> Spans | None:
    """The spans of a dimension of that axis when these atoms are sharded.

    Empty when none of its atoms is sharded, None when spans cannot express the shards.

    Args:
        sharded_axes: for each atom its number of shards, the number of neighbouring ranks with the same one, and its site's
            index.
    """
    axis = axis.find()
    if not any(atom.find() in sharded_axes for atom in axis.atoms()):
        return ()
    if axis.form == "atom":
        return (Span(1, axis.size, 1, *sharded_axes[axis]),)
    if axis.form == "sum":
        parts = [(segment, spans_of(segment, sharded_axes)) for segment in axis.segments()]
        joined = [() if spans is None else spans or (Span(1, segment.size, 1, 1),) for segment, spans in parts]
        return tuple(span for spans in joined for span in spans) if all(joined) else None
    merged: Spans | None = None
    passed: Size = 1
    for factor in axis.factors():
        inner = spans_of(factor, sharded_axes)
        if inner is None:
            return None
        if merged and inner:
            (first, *others), (second, *more) = merged, inner
            if others or more or first.block != 1 or first.inner != 1 or second.outer != 1:
                return None
            merged = (
                Span(first.outer, first.size * second.size, second.inner, first.parts * second.parts, second.every, first.site),
            )
        elif inner:
            if passed != 1 and len(inner) > 1:
                return None
            merged = tuple(span.shaped(passed * span.outer, span.size, span.inner) for span in inner)
        elif merged:
            if len(merged) > 1 and any(span.outer != 1 for span in merged):
                return None
            merged = tuple(span.shaped(span.outer, span.size, span.inner * factor.size) for span in merged)
        else:
            passed = passed * factor.size
    return merged
