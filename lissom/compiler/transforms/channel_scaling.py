"""Finds input channels of linear layers that can be scaled without changing the outputs, and scales them.

The producer of the channels, a norm or a linear layer, is changed to divide each channel by its factor s_j; the layers that
read them multiply the matching columns of their weights by it. The operators between must be homogeneous: views, an attention
in its values, a product with another value, ReLU.

    norm → linear layers      its weight and bias / s            columns · s
    v → output projection     rows of v and its bias / s         columns · s, the same for all heads that share a value head
    up → down                 rows of up and its bias / s        columns · s, with ReLU between, or for the branch of a gated
                                                                 feed-forward without activation

Channels are matched by their axes, so packed projections and grouped heads need no rule of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem

import torch
from torch import fx

from lissom.compiler.analysis.axes.axes import axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.base import Value
from lissom.compiler.analysis.axes.columns import WeightUnits, unit_of
from lissom.compiler.analysis.module_filter import obstacle_by_name
from lissom.compiler.analysis.structure.linear import bias_of, input_of, is_linear
from lissom.compiler.analysis.structure.matrix import Matrix, matrices_of, matrix_of, readers_of
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention, Binary
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.match import is_own_weight
from lissom.compiler.ir.operators import HOMOGENEOUS, LAYER_NORMS, MULTIPLY, SHAPES
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import fixed
from lissom.compiler.ir.view_calls import Index

aten = torch.ops.aten


@dataclass(frozen=True)
class Reader:
    """A linear layer that reads the channels.

    Attributes:
        channel: [in_features], the channel each column reads; -1 for none.
    """

    layer: fx.Node
    matrix: Matrix
    channel: torch.Tensor


@dataclass(frozen=True)
class ScalingSite:
    """Channels that can be scaled.

    Attributes:
        producer: a norm or a linear layer.
        parameters: its weight and bias.
        matrix: of the linear layer, None for a norm.
    """

    producer: fx.Node
    count: int
    parameters: tuple[WeightUnits, ...]
    readers: tuple[Reader, ...]
    matrix: Matrix | None

    def by_channel(self, reader: Reader, values: torch.Tensor) -> torch.Tensor:
        """The largest of the values of each channel's columns, [channels].

        Args:
            values: [in_features], not negative.
        """
        return _largest(values, reader.channel, self.count)

    def columns(self, reader: Reader, factors: torch.Tensor) -> torch.Tensor:
        """The factor of each column of a reader, [in_features].

        Args:
            factors: [channels].
        """
        return _spread(factors, reader.channel)

    def read_sizes(self, program: Program) -> torch.Tensor:
        """The largest magnitude in the columns that read each channel, [channels]."""
        columns = [(reader, reader.matrix.read(program).float().abs().flatten(0, -2).amax(0)) for reader in self.readers]
        return torch.stack([self.by_channel(*pair) for pair in columns]).amax(0)

    def rows(self, program: Program) -> torch.Tensor:
        """The largest magnitude in the rows of the producer's matrix for each channel, [channels]."""
        assert self.matrix is not None, "a norm has no rows"
        rows = torch.stack([part.float().abs().amax(1) for part in matrices_of(self.matrix.read(program))]).amax(0)
        return _largest(rows, self.parameters[0].unit, self.count)

    def scale(self, edit: Editor, factors: torch.Tensor) -> None:
        """Divide the channels by these factors, and multiply the columns that read them.

        For weights in reduced precision the factors are rounded to powers of two, which change no weight's mantissa.

        Args:
            factors: [channels], positive.
        """
        made = [edit.tensor(reader.weight) for reader in self.parameters]
        read = [reader.matrix.read(edit.program) for reader in self.readers]
        if any(weight.dtype.itemsize < 4 for weight in (*made, *read)):
            factors = factors.log2().round().exp2()
        for parameter, weight in zip(self.parameters, made, strict=True):
            shape = [-1 if dim == parameter.dim else 1 for dim in range(weight.dim())]
            divided = weight.float() / _spread(factors, parameter.unit).reshape(shape)
            edit.set_weight(parameter.weight, divided.to(weight.dtype))
        for reader, weight in zip(self.readers, read, strict=True):
            reader.matrix.write(edit, weight.float() * self.columns(reader, factors))


def scaling_sites(edit: Editor, *, norms: bool = True, linears: bool = True) -> list[ScalingSite]:
    """The sites of a program whose producer is a norm or a linear layer.

    Norms, value projections and first layers of feed-forwards that are no producers are reported.
    """
    transformer = edit.program.fact(structure)
    known = set[fx.Node](transformer.norms)
    known |= {layer for site in transformer.attention if site.output is not None for layer in site.v}
    known |= {layer for site in transformer.feed_forward for layer in site.up}
    sites: list[ScalingSite] = []
    for node in edit.program.nodes():
        if not (norms if node in transformer.norms else linears and is_linear(node) and node not in transformer.convolutions):
            continue
        site = scaling_site(edit.program, node)
        if not isinstance(site, str):
            sites.append(site)
        elif node in known:
            edit.skip(node, site)
    return sites


def chosen_sites(edit: Editor, *, norms: bool, linears: bool, skip: str, only: str) -> list[ScalingSite]:
    """The sites whose producers the patterns `skip` and `only` select; the others are reported."""
    sites = scaling_sites(edit, norms=norms, linears=linears)
    reasons = {site.producer: obstacle_by_name(site.producer, skip=skip, only=only) for site in sites}
    return [site for site in sites if edit.may_change(site.producer, reasons[site.producer])]


def scaling_site(program: Program, producer: fx.Node) -> ScalingSite | str:
    """The site with this producer, or why there is none."""
    start, others = _start(producer)
    layers = _readers(start)
    if isinstance(layers, str):
        return layers
    made = _parameters(producer)
    if isinstance(made, str):
        return made
    known = program.fact(axes)
    own = known.axis(producer, -1)
    axes_read = [known.axis(input_of(layer), -1) for layer in layers]
    shared = _shared(own, [_atoms(known.of[start]), *(set(axis.atoms()) for axis in axes_read)])
    if not shared:
        return "its output channels cannot be matched to the columns that read them"
    count = math.prod(fixed(atom.size) for atom in shared)
    readers: list[Reader] = []
    for layer, axis in zip(layers, axes_read, strict=True):
        matrix = matrix_of(layer, stacks=True)
        if isinstance(matrix, str):
            return f"a layer that reads it cannot be scaled: {matrix}"
        if readers_of(matrix.node) != [layer]:
            return "a layer that reads it cannot be scaled: its weight is read elsewhere too"
        readers.append(Reader(layer, matrix, unit_of(axis, shared)))
    weights, matrix = made
    channel = unit_of(own, shared)
    read = torch.cat([reader.channel for reader in readers]).unique()
    if not bool((channel >= 0).any()) or not bool(torch.isin(read, channel).all()):
        return "its output channels cannot be matched to the columns that read them"
    for other in others:
        atoms = _atoms(known.of[other])
        same = tuple(atom for atom in dict.fromkeys(own.atoms()) if atom in atoms)
        if not same or bool(((unit_of(own, same) >= 0) & (channel >= 0)).any()):
            return "its output channels cannot be separated from other outputs"
    parameters = tuple(WeightUnits(weight, _channel_dim(weight, matrix), channel) for weight in weights)
    return ScalingSite(producer, count, parameters, tuple(readers), matrix)


def _channel_dim(weight: fx.Node, matrix: Matrix | None) -> int:
    """The dimension of the channels in a weight or bias of the producer."""
    if matrix is None or weight is not matrix.node:
        return 0
    return nodes.tensor_type(weight).rank - (1 if matrix.transposed else 2)


def _shared(own: Axis, others: list[set[Axis]]) -> tuple[Axis, ...]:
    """The atoms of the producer's channels that are in each of these sets; empty unless all their sizes are fixed.

    One set has the atoms of the piece that is read: a packed projection also has the groups of query heads, which the output
    projection reads, but the values have no such axis.
    """
    shared = tuple(atom for atom in dict.fromkeys(own.atoms()) if all(atom in atoms for atoms in others))
    return shared if all(isinstance(atom.size, int) for atom in shared) else ()


def _atoms(value: Value) -> set[Axis]:
    """The atoms of all dimensions of a value, which may be a tuple of tensors."""
    return {atom for part in value for atom in (part.atoms() if isinstance(part, Axis) else _atoms(part))}


def _parameters(producer: fx.Node) -> tuple[list[fx.Node], Matrix | None] | str:
    """The weights of the producer, the matrix of a linear layer first; or why they cannot be scaled."""
    if is_linear(producer):
        matrix = matrix_of(producer, stacks=True)
        if isinstance(matrix, str):
            return matrix
        if readers_of(matrix.node) != [producer]:
            return "its weight is read elsewhere too"
        weight, bias = matrix.node, bias_of(producer)
    elif producer.target in LAYER_NORMS:
        matrix, weight = None, nodes.argument(producer, "weight")
        bias = nodes.argument(producer, "bias") if producer.target is aten.layer_norm.default else None
        if not is_own_weight(weight):
            return "the norm has no weight of its own"
    else:
        return "it is no layer norm and no RMS norm"
    if bias is None:
        return [weight], matrix
    return ([weight, bias], matrix) if is_own_weight(bias) else "its bias is computed, or read elsewhere too"


def _readers(start: fx.Node) -> list[fx.Node] | str:
    """The linear layers that read a value, if all its uses are linear layers behind homogeneous operators; else the reason."""
    layers: dict[fx.Node, None] = {}
    walked: dict[fx.Node, None] = {start: None}
    pending = [start]
    while pending:
        node = pending.pop(0)
        if not node.users:
            return "nothing reads it"
        for user in node.users:
            if is_linear(user) and input_of(user) is node and user.all_input_nodes.count(node) == 1:
                layers[user] = None
            elif not _carries(user, node):
                named = "the program's caller" if user.op == "output" else str(user.target).removesuffix(".default")
                return f"its output is also read by {named}, which no scale passes through"
            elif user not in walked:
                walked[user] = None
                pending.append(user)
    for node in walked:
        if (
            nodes.is_call(node, aten.mul.Tensor)
            and node is not start
            and {Binary(node).left, Binary(node).right} <= walked.keys()
        ):
            return "it is multiplied by itself"
    return list(layers)


def _carries(user: fx.Node, node: fx.Node) -> bool:
    """True when scaling this input by s scales the node's result by s."""
    if (attention := Attention.of(user)) is not None:
        return attention.v is node and user.all_input_nodes.count(node) == 1 and node not in (attention.q, attention.k)
    if user.target in MULTIPLY:
        return True
    if user.target is aten.div.Tensor:
        return Binary(user).left is node and Binary(user).right is not node
    if (rows := Index.of(user)) is not None:
        # The rows of experts are gathered, with all their features.
        return rows.x is node and node not in rows.indices and len(rows.indices) < nodes.tensor_type(node).rank
    return user.target in SHAPES or user.target in HOMOGENEOUS or user.target is getitem


def _start(producer: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The output of a node, or the piece of it that linear layers read through homogeneous operators.

    Returned with the other pieces of the split.
    """
    start = next((piece for piece in _pieces(producer, []) if not isinstance(_readers(piece[0]), str)), None)
    return start or (producer, [])


def _pieces(node: fx.Node, others: list[fx.Node]) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """A value, and its pieces through views and splits, each with the other pieces of the split."""
    yield node, others
    if all(user.target in SHAPES or user.target is getitem for user in node.users):
        for user in node.users:
            beside = [sibling for sibling in node.users if sibling is not user]
            yield from _pieces(user, others + beside)


def _spread(factors: torch.Tensor, channel: torch.Tensor) -> torch.Tensor:
    """The factor of each index; 1 where it has no channel."""
    index = channel.to(factors.device)
    return torch.where(index < 0, torch.ones((), device=factors.device), factors[index.clamp_min(0)])


def _largest(values: torch.Tensor, channel: torch.Tensor, count: int) -> torch.Tensor:
    """The largest of the values of each channel, [channels].

    Args:
        values: not negative.
    """
    index = channel.to(values.device)
    largest = torch.zeros(count, device=values.device)
    return largest.scatter_reduce_(0, index[index >= 0], values[index >= 0].float(), "amax")
