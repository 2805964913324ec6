"""Values that are exactly zero for all inputs, derived from zeros in the weights.

For every dimension of every value: the indices at which the whole value is zero. A row of zeros in a weight without a bias
makes a feature zero; a product is zero where either factor is; a sum is zero where both terms are; views move zeros.
Inputs are assumed finite: zero times infinity is not zero.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import cast

import torch
from torch import fx

from lissom.compiler.analysis.axes.axes import Axes, axes
from lissom.compiler.analysis.axes.axis import Axis, sizes_of
from lissom.compiler.analysis.axes.columns import unit_of, units_within
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.dimension_map import channel_dim, dim_of, dimension_map
from lissom.compiler.ir.dimensions import Dim, Operand, declaration, named, parts_of
from lissom.compiler.ir.operators import packet_of
from lissom.compiler.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Zero:
    """The zeros of one value.

    Attributes:
        at: for each dimension with zeros, the indices that are zero, [size] of booleans.
        whole: the value is zero everywhere.
    """

    at: Mapping[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    whole: bool = False


NOWHERE = Zero()
EVERYWHERE = Zero(whole=True)
Zeros = Mapping[fx.Node, Zero]
_Rule = Callable[[fx.Node, "_Known"], Zero]


@dataclass
class _Known:
    program: Program
    axes: Axes
    zeros: dict[fx.Node, Zero]

    def of(self, argument: object) -> Zero:
        """The zeros of an argument; a missing bias is zero everywhere."""
        if argument is None:
            return EVERYWHERE
        if isinstance(argument, fx.Node):
            return self.zeros.get(argument, NOWHERE)
        return EVERYWHERE if isinstance(argument, (int, float)) and argument == 0 else NOWHERE


def zeros(program: Program) -> Zeros:
    """The zeros of a program's values; use it as `program.fact(zeros)`. Values without zeros have no entry."""
    known = _Known(program, program.fact(axes), {})
    for node in program.graph.nodes:
        zero = NOWHERE
        if node.op == "get_attr" and str(node.target) not in program.state:
            zero = _of_weight(program.weight(str(node.target)))
        elif node.op == "call_function" and any(used in known.zeros for used in node.all_input_nodes):
            zero = _rule(node)(node, known) if nodes.is_tensor(node) else _same(node, known) if _moves(node) else NOWHERE
        settled = _settled(zero) if zero.whole or zero.at else NOWHERE
        if settled.whole or settled.at:
            known.zeros[node] = settled
    return known.zeros


def is_zero(zeros: Zeros, argument: object) -> bool:
    """True when the value is zero everywhere."""
    return isinstance(argument, fx.Node) and zeros.get(argument, NOWHERE).whole


def zero_at(zeros: Zeros, node: fx.Node, dim: int) -> torch.Tensor:
    """The indices of a dimension of fixed size at which the value is zero, [size] of booleans."""
    shape = nodes.tensor_type(node).shape
    return _at(zeros.get(node, NOWHERE), 0, dim % len(shape), cast(int, shape[dim]))


def _of_weight(weight: torch.Tensor) -> Zero:
    """The zeros of a weight; only floating-point weights are read."""
    if not weight.is_floating_point() or weight.numel() == 0:
        return NOWHERE
    living = weight.detach() != 0
    if bool(living.all()):
        return NOWHERE
    if not bool(living.any()):
        return EVERYWHERE
    others = {dim: [other for other in range(weight.dim()) if other != dim] for dim in range(weight.dim())}
    at = {dim: ~(living.any(rest) if rest else living).cpu() for dim, rest in others.items()}
    return Zero({dim: mask for dim, mask in at.items() if bool(mask.any())})


def _settled(zero: Zero) -> Zero:
    """The zeros without the dimensions that have none; everywhere if all of a dimension is zero."""
    at = {dim: mask for dim, mask in zero.at.items() if bool(mask.any())}
    return EVERYWHERE if zero.whole or any(bool(mask.all()) for mask in at.values()) else Zero(at)


def _rule(node: fx.Node) -> _Rule:
    called = packet_of(node)
    if called in ops.KEEPS_ZERO:
        return _same
    return _RULES.get(node.target) or _RULES.get(called, _moved if declaration(node) is None else _by_name)


def _same(node: fx.Node, known: _Known) -> Zero:
    return known.of(node.args[0])


def _at(zero: Zero, shift: int, dim: int, size: int) -> torch.Tensor:
    """The zeros of an operand along a dimension of the result; a broadcast operand has some only if it is zero everywhere."""
    mask = zero.at.get(dim - shift)
    if zero.whole:
        return torch.ones(size, dtype=torch.bool)
    return mask if mask is not None and len(mask) == size else torch.zeros(size, dtype=torch.bool)


def _combined(node: fx.Node, known: _Known, *, items: slice, join: Callable[..., torch.Tensor] = torch.logical_and) -> Zero:
    """Zero where all of these arguments are, or with `torch.logical_or` where one of them is."""
    rank = nodes.tensor_type(node).rank
    operands = [
        (known.of(argument), rank - nodes.tensor_type(argument).rank if nodes.is_tensor(argument) else 0)
        for argument in node.args[items]
    ]
    at = {
        dim: reduce(join, [_at(zero, shift, dim, size) for zero, shift in operands])
        for dim, size in enumerate(nodes.tensor_type(node).shape)
        if isinstance(size, int) and size > 1
    }
    every = all if join is torch.logical_and else any
    return Zero(at, every(zero.whole for zero, _ in operands))


def _power(node: fx.Node, known: _Known) -> Zero:
    exponent = nodes.argument(node, "exponent")
    return known.of(node.args[0]) if isinstance(exponent, (int, float)) and exponent > 0 else NOWHERE


def _by_name(node: fx.Node, known: _Known) -> Zero:
    """Zero where one factor is and everything that is added: the result is linear in each factor."""
    call = named(node)
    if call is None or isinstance(nodes.node_type(node), tuple):
        return NOWHERE
    factors = [operand for operand in call.operands if operand.is_factor]
    added = [operand for operand in call.operands if operand.is_added]
    at: dict[int, torch.Tensor] = {}
    for dim, name in enumerate(call.results[0]):
        size = nodes.tensor_type(node).shape[dim]
        if not name or not isinstance(size, int) or not call.bound.isdisjoint(parts_of(name)):
            continue
        # What a norm with a mean makes of zeros at some of the indices that it reads is not zero.
        linear = factors[1:] if call.declared.centred and name in call.normed else factors
        masks = [_of_operand(known.of(operand.node), operand, name, size) for operand in linear]
        terms = [_of_operand(known.of(operand.node), operand, name, size) | known.of(operand.node).whole for operand in added]
        if masks:
            at[dim] = reduce(torch.logical_and, terms, reduce(torch.logical_or, masks))
    return Zero(
        at, any(known.of(operand.node).whole for operand in factors) and all(known.of(operand.node).whole for operand in added)
    )


def _of_operand(zero: Zero, operand: Operand, name: Dim, size: int) -> torch.Tensor:
    """The zeros of an operand along a dimension of the result, [size]; those of a product's first part count for all of it."""
    for part in (name, *parts_of(name)[:1]):
        mask = zero.at.get(operand.dims.index(part)) if part in operand.dims else None
        if mask is not None and size % len(mask) == 0:
            return mask.repeat_interleave(size // len(mask))
    return torch.zeros(size, dtype=torch.bool)


def _convolution(node: fx.Node, known: _Known) -> Zero:
    x, weight, bias = known.of(node.args[0]), known.of(node.args[1]), known.of(nodes.argument(node, "bias"))
    size = cast(int, nodes.tensor_type(node.args[1]).shape[0])
    rows = _at(weight, 0, 0, size)
    at = channel_dim(node)
    if nodes.argument(node, "groups") == size == nodes.tensor_type(node.args[0]).shape[at]:
        rows = rows | _at(x, 0, at, size)
    return Zero({at: rows & _at(bias, 0, 0, size)}, (x.whole or weight.whole) and bias.whole)


def _permuted(node: fx.Node, known: _Known) -> Zero:
    source, order = known.of(node.args[0]), dimension_map(node)
    assert order is not None
    return Zero({new: source.at[old] for new, old in enumerate(order) if old is not None and old in source.at}, source.whole)


def _joined(node: fx.Node, known: _Known) -> Zero:
    """Concatenation: along its dimension each part keeps its zeros; along others, only zeros common to all parts remain."""
    parts = cast("list[fx.Node]", node.args[0])
    rank = nodes.tensor_type(node).rank
    seam = dim_of(node, rank)
    part_zeros = [known.of(part) for part in parts]
    at: dict[int, torch.Tensor] = {}
    for dim, size in enumerate(nodes.tensor_type(node).shape):
        sizes = [nodes.tensor_type(part).shape[dim] for part in parts if nodes.tensor_type(part).rank == rank]
        if not isinstance(size, int) or not all(isinstance(part_size, int) for part_size in sizes) or len(sizes) != len(parts):
            continue
        masks = [_at(zero, 0, dim, cast(int, part_size)) for zero, part_size in zip(part_zeros, sizes, strict=True)]
        at[dim] = torch.cat(masks) if dim == seam else torch.stack(masks).all(0)
    return Zero(at, all(zero.whole for zero in part_zeros))


def _moved(node: fx.Node, known: _Known) -> Zero:
    """For an operator that only moves values, the zeros of an axis move with the axis."""
    if not _moves(node):
        return Zero(whole=packet_of(node) in ops.ZERO_OF_ZEROS and known.of(node.args[0]).whole)
    source = cast(fx.Node, node.args[0])
    if node.target is operator.getitem:
        source = cast(fx.Node, source.args[0])
    zero = known.of(source)
    before, after = known.axes.of.get(source, ()), known.axes.of[node]
    if zero.whole or not before or not isinstance(before[0], Axis):
        return Zero(whole=zero.whole)
    dims, wanted = cast("tuple[Axis, ...]", before), cast("tuple[Axis, ...]", after)
    if _repeats(dims) or _repeats(wanted):
        return NOWHERE
    at: dict[int, torch.Tensor] = {}
    for dim, mask in zero.at.items():
        for new, axis in enumerate(wanted):
            moved = _carried(dims[dim], mask, axis)
            if moved is not None:
                at[new] = at[new] | moved if new in at else moved
    return Zero(at)


def _carried(axis: Axis, mask: torch.Tensor, other: Axis) -> torch.Tensor | None:
    """The zeros of one axis, transferred to another that shares atoms with it; None when they share none."""
    shared = [atom for atom in dict.fromkeys(axis.atoms()) if atom in set(other.atoms())]
    if not shared or not all(isinstance(atom.size, int) for atom in (*axis.atoms(), *other.atoms())):
        return None
    dead = units_within(unit_of(axis, shared), mask, math.prod(sizes_of(shared)))
    new = unit_of(other, shared)
    return (new >= 0) & dead[new.clamp(min=0)]


def _repeats(dims: Sequence[Axis]) -> bool:
    """True when an atom is in two dimensions, which makes it ambiguous."""
    seen = [atom for axis in dims for atom in set(axis.atoms())]
    return len(seen) != len(set(seen))


def _moves(node: fx.Node) -> bool:
    """True for operators that only move values, and for items of their results."""
    if node.target is operator.getitem:
        return _moves(cast(fx.Node, node.args[0]))
    return node.target in ops.MOVES


_RULES: dict[object, _Rule] = {
    aten.mul: partial(_combined, items=slice(2), join=torch.logical_or),
    aten.div: partial(_combined, items=slice(1)),
    **dict.fromkeys((aten.add, aten.sub), partial(_combined, items=slice(2))),
    aten.where: partial(_combined, items=slice(1, 3)),
    aten.pow: _power,
    **dict.fromkeys(ops.CONVOLUTIONS, _convolution),
    **dict.fromkeys((aten.permute.default, *ops.TRANSPOSES), _permuted),
    **dict.fromkeys(ops.CONCATENATIONS, _joined),
}
"""By overload, or by operator where the rule holds for every overload."""
