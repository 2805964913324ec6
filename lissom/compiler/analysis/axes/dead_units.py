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
from lissom.compiler.analysis.structure.linear import is_attention
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.dimension_map import channel_dim
from lissom.compiler.ir.operators import reduced_dims
from lissom.compiler.ir.program import Program

aten = torch.ops.aten

Place = tuple[fx.Node, int]
"""A dimension of a value."""


def dead_units(program: Program, numbering: Sequence[Axis]) -> torch.Tensor:
    """The units that contribute nothing, [sizes of the axes that number them] of booleans.

    numbering: atomic axes; a unit is one index of each, such as a group and a head in it.
    """
    found, zero = program.fact(axes), program.fact(zeros)
    dead = torch.ones(sizes_of(numbering), dtype=torch.bool)
    for places in program.fact(_contractions):
        touched = [place for place in places if not set(numbering).isdisjoint(found.axis(*place).atoms())]
        if touched:
            dead &= torch.stack([zero_units(found, zero, place, numbering) for place in touched]).any(0)
    return dead


def _contractions(program: Program) -> list[list[Place]]:
    """For every sum over a dimension in a program, the operands' dimensions; a term is zero where one operand is."""
    return [places for node in program.nodes() for places in summed(node)]


def summed(node: fx.Node) -> list[list[Place]]:
    """For each sum that a call computes, the dimensions of its operands it runs over."""
    args = cast("tuple[fx.Node, ...]", node.args)
    if node.target is aten.linear.default:
        return [[(args[0], -1), (args[1], 1)]]
    if node.target in (*ops.MATMULS, *ops.GROUPED_PRODUCTS):
        return [[(args[0], -1), (args[1], -2 if nodes.tensor_type(args[1]).rank > 1 else -1)]]
    if node.target in ops.MATMULS_WITH_BIAS:
        return [[(args[1], -1), (args[2], -2)]]
    if is_attention(node):
        return [[(args[0], -1), (args[1], -1)]]
    if node.target in ops.CONVOLUTIONS and nodes.argument(node, "groups") == 1:
        return [[(args[0], channel_dim(node)), (args[1], 1)]]
    if node.target in ops.SUMS:
        return [[(args[0], dim)] for dim in reduced_dims(node, nodes.tensor_type(args[0]).rank)]
    return _summed_by_einsum(node) if node.target is aten.einsum.default else []


def _summed_by_einsum(node: fx.Node) -> list[list[Place]]:
    inputs, _, output = cast(str, node.args[0]).replace(" ", "").partition("->")
    operands = list(zip(inputs.split(","), cast("list[fx.Node]", node.args[1]), strict=True))
    letters = dict.fromkeys(letter for letter in inputs if letter.isalpha() and letter not in output)

    def dim(term: str, letter: str) -> int:
        index = term.index(letter)
        return index - len(term) if "..." in term[:index] else index

    return [[(item, dim(term, letter)) for term, item in operands if letter in term] for letter in letters]


def zero_units(found: Axes, zero: Zeros, place: Place, numbering: Sequence[Axis]) -> torch.Tensor:
    """The units whose indices along one dimension are all zero, [sizes of the axes that number them]."""
    axis = found.axis(*place)
    present = [atom for atom in numbering if atom in set(axis.atoms())]
    if not present or not all(isinstance(atom.size, int) for atom in axis.atoms()):
        return torch.zeros(sizes_of(numbering), dtype=torch.bool)
    dead = units_within(unit_of(axis, present), zero_at(zero, *place), math.prod(sizes_of(present)))
    grid = dead.reshape([cast(int, atom.size) if atom in present else 1 for atom in numbering])
    return grid.expand(sizes_of(numbering))
