"""The weight columns that read an attention head or a neuron, in the layer after it, found from the axes.

A head or a neuron contributes nothing once these columns are zero. Pruning passes zero them; the passes that eliminate dead
structure search for zero columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import cast

import torch
from torch import fx

from lissom.compiler.analysis.axes.axes import Axes, axes
from lissom.compiler.analysis.axes.axis import Axis, sizes_of
from lissom.compiler.analysis.structure.attention import AttentionSite
from lissom.compiler.analysis.structure.feed_forward import FeedForwardSite
from lissom.compiler.analysis.structure.linear import input_of, weight_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.dimension_map import channel_dim
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import CONVOLUTIONS
from lissom.compiler.ir.program import Program


@dataclass(frozen=True)
class WeightUnits:
    """The indices along one dimension of a weight, by the unit each belongs to: a head, a neuron or a channel.

    Attributes:
        weight: the node that reads the weight.
        unit: [size of `dim`], the unit of each index; -1 where it belongs to none.
    """

    weight: fx.Node
    dim: int
    unit: torch.Tensor

    @property
    def name(self) -> str:
        return str(self.weight.target)

    def indices(self, units: int | Iterable[int]) -> torch.Tensor:
        """The indices along `dim` that belong to these units, [indices], in order."""
        wanted = torch.tensor([units] if isinstance(units, int) else [*units], dtype=torch.long)
        return torch.isin(self.unit, wanted).nonzero().flatten()

    def by_unit(self) -> torch.Tensor:
        """The indices of every unit, [units, indices per unit]; all units have equally many."""
        return torch.stack([self.indices(unit) for unit in range(int(self.unit.max()) + 1)])

    def read(self, program: Program) -> torch.Tensor:
        """A copy of the weight's values for every unit: [units, indices per unit, the other dimensions]."""
        weight = program.weight(self.name).detach().movedim(self.dim, 0)
        return weight[self.by_unit().to(weight.device)]

    def write(self, edit: Editor, values: torch.Tensor) -> None:
        """Set the weight's values for every unit, in this program only.

        Args:
            values: as returned by `read`.
        """
        weight = edit.program.weight(self.name).detach().movedim(self.dim, 0).clone()
        weight[self.by_unit().to(weight.device)] = values.to(weight)
        edit.set_weight(self.weight, weight.movedim(0, self.dim).contiguous())


@dataclass(frozen=True)
class Columns(WeightUnits):
    """The columns of one weight that read the units of a site: its heads or its neurons. `dim` is summed over.

    Attributes:
        layer: the linear layer.
        count: the number of units.
        axes: the axes whose indices number the units, the last one fastest.
    """

    layer: fx.Node
    count: int
    axes: tuple[Axis, ...]

    @property
    def alone(self) -> bool:
        """True if the layer reads the units only."""
        return bool((self.unit >= 0).all())

    def read_matrix(self, program: Program) -> torch.Tensor:
        """A float32 copy of the weight as [out_features, in_features]."""
        weight = program.weight(str(self.weight.target)).detach()
        return weight.movedim(self.dim, -1).flatten(0, -2).to(torch.float32, copy=True)

    def write_matrix(self, edit: Editor, matrix: torch.Tensor) -> None:
        """Give the weight new values, in this program only.

        Args:
            matrix: [out_features, in_features].
        """
        weight = edit.program.weight(str(self.weight.target)).detach()
        shape = weight.movedim(self.dim, -1).shape
        edit.set_weight(self.weight, matrix.to(weight.dtype).reshape(shape).movedim(-1, self.dim).contiguous())

    def zeroed(self, weight: torch.Tensor, units: int | Iterable[int]) -> torch.Tensor:
        """A copy of the weight in which the columns of these units are zero; for `edit.set_weight(columns.weight, …)`."""
        return weight.detach().index_fill(self.dim, self.indices(units).to(weight.device), 0.0)

    def dead(self, weight: torch.Tensor) -> torch.Tensor:
        """True for units whose columns are all zero, [count]."""
        others = [dim for dim in range(weight.dim()) if dim != self.dim]
        zero = (weight.detach() == 0).cpu()
        return units_within(self.unit, zero.all(others) if others else zero, self.count)


def find_head_columns(program: Program, site: AttentionSite) -> Columns | str:
    """The columns that read each query head of an attention, numbered in the order of its heads; or why there are none."""
    if site.output is None:
        return "no layer projects its heads out"
    if nodes.tensor_type(site.node).rank < 3:
        return "it has no head dimension"
    program_axes = program.fact(axes)
    return _columns(program_axes, site.output, program_axes.axis(site.node, -3), site.heads, "heads")


def find_neuron_columns(program: Program, site: FeedForwardSite) -> Columns | str:
    """The columns of the down projection that read each neuron of a feed-forward, or why there are none."""
    program_axes = program.fact(axes)
    return _columns(
        program_axes, site.down, program_axes.axis(input_of(site.down), feature_dim(site.down)), site.width, "neurons"
    )


def feature_dim(layer: fx.Node) -> int:
    """The feature dimension in the input and output of a linear layer."""
    return channel_dim(layer) if layer.target in CONVOLUTIONS else -1


def _columns(program_axes: Axes, layer: fx.Node, axis: Axis, count: int, units: str) -> Columns | str:
    weight = weight_of(layer)
    assert weight is not None, "a site ends in a linear layer"
    if not nodes.tensor_type(weight).dtype.is_floating_point:
        return f"the {units} that '{layer.name}' reads cannot be assigned to columns: its weight is quantized"
    numbering = list(axis.atoms())
    inputs = set(program_axes.axis(input_of(layer), feature_dim(layer)).atoms())
    for dim, weight_axis in enumerate(cast("tuple[Axis, ...]", program_axes.of[weight])):
        present = set(weight_axis.atoms())
        if inputs and inputs.isdisjoint(present):
            continue  # of the output features: a single unit has no axis that would tell
        shared = tuple(atom for atom in dict.fromkeys(numbering) if atom in present)
        unit = unit_of(weight_axis, shared)
        if math.prod(sizes_of(shared)) == count and (shared or count == 1) and len(unit[unit >= 0].unique()) == count:
            return Columns(weight, dim, unit, layer, count, shared)
    reason = next((atom.pinned for atom in numbering if atom.pinned), None)
    if reason is None and axis.find().form == "sum":
        reason = "each is computed apart, and they are concatenated"
    reason = reason or "no dimension of its weight numbers them"
    return f"the {units} that '{layer.name}' reads cannot be assigned to columns: {reason}"


def units_within(unit: torch.Tensor, chosen: torch.Tensor, count: int) -> torch.Tensor:
    """True for units with chosen indices only, [count].

    Args:
        unit: the unit of each index.
        chosen: booleans per index.
    """
    within = torch.ones(count, dtype=torch.bool)
    within[unit[~chosen & (unit >= 0)]] = False
    return within


def unit_of(axis: Axis, numbering: Sequence[Axis]) -> torch.Tensor:
    """For each index of an axis, the number of its unit, from its indices in the atoms `numbering`, the last one fastest.

    [size of the axis]; -1 in a segment without these atoms.
    """
    unit = torch.zeros(cast(int, axis.find().size), dtype=torch.long)
    for atom in numbering:
        index = _index_of(axis, atom)
        unit = torch.where((index < 0) | (unit < 0), -1, unit * cast(int, atom.size) + index)
    return unit


def _index_of(axis: Axis, atom: Axis) -> torch.Tensor:
    """For each index of an axis, the index in one of its atoms; -1 where it has none."""
    axis = axis.find()
    size = cast(int, axis.size)
    if axis.form == "atom":
        return torch.arange(size) if axis is atom.find() else torch.full((size,), -1)
    parts = [_index_of(part, atom) for part in axis.parts]
    if axis.form == "sum":
        return torch.cat(parts)
    return reduce(lambda major, minor: torch.maximum(major[:, None], minor[None, :]).flatten(), parts)
