"""The axes of a call's result from those of its arguments: by declared dimensions, or by a rule from the table at the end."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import fx

from lissom.compiler.analysis.axes import views
from lissom.compiler.analysis.axes.axis import Axis, cut, divide, mark, pin, product, unify
from lissom.compiler.analysis.axes.base import Dims, Known, Rule, Value, broadcast, fresh, of, tensors, unknown
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.dimension_map import channel_dim, dim_of, shape_of
from lissom.compiler.ir.dimensions import Compound, Dim, Named, named
from lissom.compiler.ir.operators import is_pointwise, reduced_dims, rule_table
from lissom.compiler.ir.printer import target_text
from lissom.compiler.ir.types import TensorType

aten = torch.ops.aten


def apply(node: fx.Node, known: Known) -> Value:
    """The axes of a call's result; without a rule or declared dimensions, all axes of its arguments are pinned."""
    rule = RULES.get(node.target)
    if rule is None:
        rule = _pointwise if is_pointwise(node) or node.target in ops.LIKE else by_name
    axes = rule(node, known)
    _check(node, axes)
    return axes


def read_sizes(node: fx.Node, known: Known) -> None:
    """Pin the axes of tensors whose values are read (`item`); a size read at run time follows its axis by itself."""
    if node.target is aten.sym_size.int:
        return
    for used in node.all_input_nodes:
        for axis in known.get(used, ()):
            if isinstance(axis, Axis):
                pin(axis, f"read by {target_text(node.target)}")


def _check(node: fx.Node, axes: Value) -> None:
    """Assert that a rule gave an axis of the right size for each dimension."""
    typed = nodes.node_type(node)
    if not isinstance(typed, TensorType):
        return
    sizes = [axis.size for axis in axes if isinstance(axis, Axis)]
    static = [(have, want) for have, want in zip(sizes, typed.shape, strict=True) if isinstance(want, int)]
    assert all(not isinstance(have, int) or have == want for have, want in static), f"axes of {node.format_node()}: {sizes}"


def _pointwise(node: fx.Node, known: Known) -> Value:
    axes = broadcast(tensors(node, known), len(shape_of(node)), target_text(node.target))
    results = nodes.node_type(node)
    return (axes,) * len(results) if isinstance(results, tuple) else axes


def by_name(node: fx.Node, known: Known) -> Value:
    """Dimensions of one name are one axis; a compound is divided where the sizes of its parts say so."""
    call = named(node)
    if call is None:
        return unknown(node, known)
    operator_name = target_text(node.target)
    axes: dict[Dim, Axis] = {}

    def meet(name: str, axis: Axis) -> None:
        if name in axes:
            unify(axes[name], axis, f"'{name}' of {operator_name}")
        elif name:
            axes[name] = axis

    for operand, dim, name in call.places():
        if operand.opaque:
            pin(of(operand.node, known)[dim], f"{operator_name} reads it in a layout of its own")
        else:
            meet(name, of(operand.node, known)[dim])
    for operand in call.operands:
        for dim, axis in zip(operand.dims, of(operand.node, known), strict=True):
            if isinstance(dim, Compound):
                axes.setdefault(dim, axis)
                pieces = _pieces(axis, dim, call)
                if pieces is None:
                    pin(axis, f"{operator_name} reads '{' '.join(dim.parts)}' in it")
                for name, piece in pieces or ():
                    meet(name, piece) if name.isalpha() else pin(piece, f"{operator_name} reads all of it")
    for name in call.whole:
        mark(axes[name], whole=True)
    for name in call.normed:
        mark(axes[name], normed=True)
    for name in call.fixed:
        pin(axes[name], f"{operator_name} runs through '{name}' in order, or looks its indices up")
    results = tuple(tuple(_named_axis(dim, axes, call) for dim in dims) for dims in call.results)
    return results if isinstance(nodes.node_type(node), tuple) else results[0]


def _named_axis(dim: Dim, axes: dict[Dim, Axis], call: Named) -> Axis:
    """The axis of a result's dimension; a new one where no operand has the name."""
    if dim in axes or not dim:
        return axes.get(dim, Axis(1))
    return Axis(call.sizes[cast(str, dim)], pinned=f"a new one of {target_text(call.node.target)}")


def _pieces(axis: Axis, dim: Compound, call: Named) -> list[tuple[str, Axis]] | None:
    """The parts of an axis by name, or by size where the declaration gives one; None where it cannot be divided so."""
    pieces: list[tuple[str, Axis]] = []
    for name in dim.parts[:-1]:
        pair = (divide if dim.product else cut)(axis, int(name) if name.isdigit() else call.sizes[name])
        if pair is None:
            return None
        pieces.append((name, pair[0]))
        axis = pair[1]
    return [*pieces, (dim.parts[-1], axis)]


def _reduce(node: fx.Node, known: Known) -> Value:
    """Mean, maximum and similar: an operator reads all of the reduced axes at once."""
    dims = of(node.args[0], known)
    for index in reduced_dims(node, len(dims)):
        mark(dims[index], whole=True)
    axes = cast(Dims, views.moved(node, known))
    results = nodes.node_type(node)
    return (axes,) * len(results) if isinstance(results, tuple) else axes


def _scan(node: fx.Node, known: Known) -> Value:
    dims = of(node.args[0], known)
    for axis in dims[dim_of(node, len(dims)) :][:1]:
        mark(axis, whole=True)
    return dims


def _batch_norm(node: fx.Node, known: Known) -> Value:
    dims = of(node.args[0], known)
    if len(dims) < 2:
        return unknown(node, known)
    for weight in node.args[1:5]:
        if nodes.is_tensor(weight):
            unify(dims[1], of(weight, known)[0], "a weight of a norm")
    for axis in (dims[0], *dims[2:]) if nodes.argument(node, "training") else ():
        mark(axis, whole=True)
    return dims


def _group_norm(node: fx.Node, known: Known) -> Value:
    dims = of(node.args[0], known)
    for used in node.all_input_nodes:
        for axis in of(used, known)[:2]:
            pin(axis, "normalised in groups")
    for axis in dims[2:]:
        mark(axis, whole=True)
    return dims


def _rounded(node: fx.Node, known: Known) -> Value:
    """Quantizers are element-wise, but give two values for each byte of packed 4-bit values along the last dimension."""
    q, *grid = (of(operand, known) for operand in node.args if nodes.is_tensor(operand))
    sizes = nodes.tensor_type(node).shape
    last = q[-1] if q[-1].size == sizes[-1] else product([q[-1], Axis(2)])
    axes = (*q[:-1], last)
    for dims in grid:
        for axis, whole in zip(dims, axes, strict=bool(dims)):
            if axis.size == 1:
                continue
            blocks = (whole, None) if axis.size == whole.size else divide(whole, axis.size)
            if blocks is not None:
                unify(blocks[0], axis, "blocks of equal scale")
    for axis in (*axes, *(block_axis for dims in grid for block_axis in dims)):
        pin(axis, f"no rule for {target_text(node.target)}")
    return axes


def _convolution(node: fx.Node, known: Known) -> Value:
    x, weight = of(node.args[0], known), of(node.args[1], known)
    groups, channels = nodes.argument(node, "groups"), x[channel_dim(node)]
    if (bias := nodes.argument(node, "bias")) is not None:
        unify(of(bias, known)[0], weight[0], "a bias of a convolution")
    if groups == 1:
        unify(channels, weight[1], "contracted by a convolution")
    elif groups == channels.size == weight[0].size:
        unify(channels, weight[0], "the channels of a depthwise convolution")
    else:
        pin(channels, "convolved in groups")
        pin(weight[0], "convolved in groups")
        pin(weight[1], "convolved in groups")
    count = len(weight) - 2
    for axis in (*x[-count:], *weight[2:]):
        pin(axis, "convolved over")
    spatial = nodes.tensor_type(node).shape[-count:]
    return (*x[: -count - 1], weight[0], *(Axis(size, pinned="convolved over") for size in spatial))


RULES: dict[object, Rule] = rule_table(
    (views.getitem, [operator.getitem]),
    (lambda node, known: of(node.args[0], known), [*ops.IDENTITIES, *ops.CONVERSIONS, aten.bernoulli.default]),
    (views.moved, [aten.permute.default, *ops.TRANSPOSES, aten.unsqueeze.default, *ops.SQUEEZES]),
    (_pointwise, [aten.expand_as.default]),
    (views.moved, [*ops.EXPANDS, *ops.SUMS]),
    (views.reshape, ops.RESHAPES),
    (views.reshape_as, ops.RESHAPES_AS),
    (views.repeat, [aten.repeat.default]),
    (views.repeat_interleave, [aten.repeat_interleave.self_int]),
    (views.cat, ops.CONCATENATIONS),
    (views.stack, [aten.stack.default]),
    (views.split, ops.SPLITS),
    (views.unbind, [aten.unbind.int]),
    (views.select, [aten.select.int]),
    (views.slice_of, [aten.slice.Tensor]),
    (_reduce, [*ops.REDUCTIONS, *ops.REDUCTIONS_WITH_INDICES]),
    (_scan, [*ops.SOFTMAX, *ops.LOG_SOFTMAX, *ops.CUMULATIVE]),
    (views.reorder, [aten.flip.default, aten.roll.default, aten.tril.default, aten.triu.default, aten.rot90.default]),
    (_batch_norm, [aten.batch_norm.default]),
    (_group_norm, [aten.group_norm.default]),
    (_rounded, ops.QUANTIZERS),
    (_convolution, ops.CONVOLUTIONS),
    (views.index_select, [aten.index_select.default]),
    (views.index_copy, [aten.index_copy.default, aten.index_copy_.default]),
    (views.copy, [aten.copy_.default]),
    (views.gather, [aten.gather.default, aten.take_along_dim.default]),
    (views.index, [aten.index.Tensor]),
    (lambda node, known: fresh(nodes.node_type(node)), ops.NEW_TENSORS),
    (
        lambda node, known: fresh(nodes.node_type(node), "its values count positions"),
        [*ops.RANGES, aten.linspace.default, aten.eye.default],
    ),
)
"""The rules by operator."""
