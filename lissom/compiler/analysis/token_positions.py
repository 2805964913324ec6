"""The dimensions along which a call works per position: index i of its result depends on index i of its operands only.

A selection of positions can then move before the call, f(x)[i] = f(x[i]), or the call can run on some positions only.
This is stricter than `axes`, where a dimension that is reduced or mixed is still the same dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard, cast

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.dimension_map import dim_of, dimension_map, shape_of
from lissom.compiler.ir.dimensions import Dim, Slot, declaration, named
from lissom.compiler.ir.operators import rule_table
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import TensorType
from lissom.ops.quantization import fake_quantize, fake_quantize_dynamic

aten = torch.ops.aten

Sources = dict[Slot, int]
Rule = Callable[[fx.Node, int], "Sources | None"]


def position_sources(node: fx.Node, dim: int) -> Sources | None:
    """For dimension `dim` of a call's result, the operands it comes from, with their matching dimensions.

    Operands not listed are the same for every position. None when a position depends on several positions, or on none.
    For a call that returns several tensors, `dim` is a dimension of each of them.
    """
    default = _pointwise if ops.is_pointwise(node) else _mapped if declaration(node) is None else _by_name
    sources = RULES.get(node.target, default)(node, dim)
    return sources or None


def operands(node: fx.Node) -> dict[Slot, fx.Node]:
    """The tensors a call reads, by their place in the call."""
    tensors: dict[Slot, fx.Node] = {}
    for index, argument in enumerate(node.args):
        if isinstance(argument, (list, tuple)):
            tensors |= {(index, place): part for place, part in enumerate(argument) if _is_value(part)}
        elif _is_value(argument):
            tensors[index] = argument
    return tensors | {key: argument for key, argument in node.kwargs.items() if _is_value(argument)}


def with_operands(node: fx.Node, changed: Mapping[Slot, object]) -> tuple[list[object], dict[str, object]]:
    """The call's arguments with some operands replaced."""
    args: list[object] = [list(argument) if isinstance(argument, (list, tuple)) else argument for argument in node.args]
    kwargs: dict[str, object] = dict(node.kwargs)
    for slot, operand in changed.items():
        if isinstance(slot, str):
            kwargs[slot] = operand
        elif isinstance(slot, int):
            args[slot] = operand
        else:
            cast("list[object]", args[slot[0]])[slot[1]] = operand
    return args, kwargs


def row_position(program: Program, node: fx.Node) -> fx.Node | None:
    """The positions `p` of `x[arange(batch), p]`; None when the node is no such call."""
    indices = cast(Sequence[object], node.args[1])
    if len(indices) != 2 or not all(map(nodes.is_tensor, indices)):
        return None
    rows, position = (cast(fx.Node, index) for index in indices)
    batch = shape_of(node.args[0])[0]
    if nodes.tensor_type(position).rank != 1 or nodes.tensor_type(position).dtype == torch.bool:
        return None
    if shape_of(rows) != (batch,) or shape_of(position) != (batch,):
        return None
    if rows.op == "get_attr":
        return position if torch.equal(program.weight(str(rows.target)), torch.arange(cast(int, batch))) else None
    return position if nodes.is_call(rows, aten.arange.default) else None


def _is_value(argument: object) -> TypeGuard[fx.Node]:
    return isinstance(argument, fx.Node) and isinstance(nodes.node_type(argument), (TensorType, tuple))


def _aligned(node: fx.Node, dim: int, slots: Mapping[Slot, fx.Node]) -> Sources:
    """The operands that have the dimension when they are broadcast to the result."""
    shape = shape_of(node)
    back = len(shape) - dim
    sources: Sources = {}
    for slot, operand in slots.items():
        own = shape_of(operand)
        if len(own) >= back and (own[-back] != 1 or shape[dim] == 1):
            sources[slot] = len(own) - back
    return sources


def _pointwise(node: fx.Node, dim: int) -> Sources | None:
    return _aligned(node, dim, operands(node))


def _mapped(node: fx.Node, dim: int) -> Sources | None:
    """Views, reductions and similar: by the call's dimension map, unless the call takes sizes from a second tensor."""
    sources = None if node.target in (*ops.RESHAPES_AS, aten.expand_as.default) else dimension_map(node)
    source = None if sources is None else sources[dim]
    return None if source is None else {0: source}


def _by_name(node: fx.Node, dim: int) -> Sources | None:
    """The operands that have a dimension of the same name. Positions are none of a weight's, nor of what is read as a whole."""
    call = named(node)
    names = {dims[dim] if dim < len(dims) else "" for dims in call.results} if call is not None else set[Dim]()
    name = names.pop() if len(names) == 1 else ""
    if call is None or not name or name in call.whole | call.normed | call.fixed | call.bound:
        return None
    places = {operand: at for operand, at, dim_name in call.places() if dim_name == name}
    of_weights = any(operand.name == "weight" or operand.is_added for operand in places)
    return None if of_weights else {operand.slot: at for operand, at in places.items()}


def _joined(node: fx.Node, dim: int) -> Sources | None:
    """cat, stack: the tensors of full rank; `cat` also accepts empty tensors of rank 1."""
    sources = dimension_map(node)
    source = None if sources is None else sources[dim]
    rank = len(shape_of(node)) - (node.target is aten.stack.default)
    return None if source is None else {slot: source for slot, used in operands(node).items() if len(shape_of(used)) == rank}


def _fake_quantize(node: fx.Node, dim: int) -> Sources | None:
    """With one scale for all; a scale of each channel belongs to its position."""
    return {0: dim} if all(size == 1 for size in shape_of(node.args[1])) else None


def _fake_quantize_dynamic(node: fx.Node, dim: int) -> Sources | None:
    """A token has its own scales, a tensor one that all positions determine."""
    return {0: dim} if nodes.argument(node, "granularity") != "tensor" and dim < len(shape_of(node)) - 1 else None


RULES: dict[object, Rule] = rule_table(
    (_fake_quantize, [fake_quantize]),
    (_fake_quantize_dynamic, [fake_quantize_dynamic]),
    (_joined, ops.JOINS),
    (lambda node, dim: {2: 0} if dim == dim_of(node, len(shape_of(node))) else {0: dim}, [aten.index_select.default]),
    (lambda node, dim: {0: 0} if dim == 0 else None, ops.CONVOLUTIONS),
)
"""The rules of operators whose dimensions are not declared; views and reductions use their dimension map instead."""
