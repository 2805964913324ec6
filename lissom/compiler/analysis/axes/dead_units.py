"""Indices of axes that contribute nothing: every sum over them has zeros there, in a weight or in an activation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from lissom.compiler.analysis.axes.axes import Axes, axes
from lissom.compiler.analysis.axes.axis import Axis, sizes_of
from lissom.compiler.analysis.axes.columns import unit_of, units_within
from lissom.compiler.analysis.axes.zeros import Zeros, zero_at, zeros
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.calls import Convolution
from lissom.compiler.ir.dimension_map import channel_dim
from lissom.compiler.ir.dimensions import named
from lissom.compiler.ir.operators import reduced_dims
from lissom.compiler.ir.program import Program

aten = torch.ops.aten

Place = tuple[fx.Node, int]
"""A dimension of a value."""


def dead_units(program: Program, numbering: Sequence[Axis]) -> torch.Tensor:
    """The units that contribute nothing, [sizes of the axes that number them] of booleans.

    Args:
        numbering: atomic axes; a unit is one index of each, such as a group and a head in it.
    """
    program_axes, zero = program.fact(axes), program.fact(zeros)
    dead = torch.ones(sizes_of(numbering), dtype=torch.bool)
    for places in program.fact(_contractions):
        touched = [place for place in places if not set(numbering).isdisjoint(program_axes.axis(*place).atoms())]
        if touched:
            dead &= torch.stack([zero_units(program_axes, zero, place, numbering) for place in touched]).any(0)
    return dead


def _contractions(program: Program) -> list[list[Place]]:
    """For every sum over a dimension in a program, the operands' dimensions; a term is zero where one operand is."""
    return [places for node in program.nodes() for places in summed(node)]


def summed(node: fx.Node) -> list[list[Place]]:
    """For each sum that a call computes, the dimensions of its operands it runs over."""
    if (convolution := Convolution.of(node)) is not None and convolution.groups == 1:
        return [[(convolution.x, channel_dim(node)), (convolution.weight, 1)]]
    if node.target in ops.SUMS:
        operand = nodes.operand(node)
        return [[(operand, dim)] for dim in reduced_dims(node, nodes.tensor_type(operand).rank)]
    call = named(node)
    if call is None:
        return []
    return [[(operand.node, dim) for operand, dim, dim_name in call.places() if dim_name == name] for name in call.summed]


def zero_units(program_axes: Axes, zero: Zeros, place: Place, numbering: Sequence[Axis]) -> torch.Tensor:
    """The units whose indices along one dimension are all zero, [sizes of the axes that number them]."""
    axis = program_axes.axis(*place)
    present = [atom for atom in numbering if atom in set(axis.atoms())]
    if not present or not all(isinstance(atom.size, int) for atom in axis.atoms()):
        return torch.zeros(sizes_of(numbering), dtype=torch.bool)
    dead = units_within(unit_of(axis, present), zero_at(zero, *place), math.prod(sizes_of(present)))
    grid = dead.reshape([cast(int, atom.size) if atom in present else 1 for atom in numbering])
    return grid.expand(sizes_of(numbering))
