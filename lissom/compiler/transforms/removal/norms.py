"""Norms over an axis that loses indices at which their input is zero: the outputs stay those of the original size.

With k of n features left, and zeros in the others, Σ x² and Σ x do not change, but the norm now divides by k.

    rms_norm:    x / √(Σx²/n + ε) · w  =  x / √(Σx²/k + ε n/k) · w √(n/k)      exact, without cost at run time
    layer_norm:  the mean over n differs from the mean over k, and its square enters the variance for each removed feature;
                 so zeros are padded before the norm and sliced off after it: two copies, small beside a matrix product,
                 and every backend has a kernel for the operator
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from lissom.compiler.analysis.axes.axes import Axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.base import of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Norm
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.match import is_own_weight
from lissom.compiler.ir.printer import target_text
from lissom.errors import UnsupportedError

aten = torch.ops.aten

Mask = Callable[[Axis], torch.Tensor]


def normed_axes(node: fx.Node, program_axes: Axes) -> tuple[Axis, ...]:
    """The axes that a norm reduces."""
    return of(node, program_axes.of)[-len(Norm(node).shape) :]


def follow_norm(edit: Editor, node: fx.Node, program_axes: Axes, mask: Mask) -> None:
    """Change a norm so that its output at the remaining indices does not change.

    Args:
        mask: which indices of an axis stay.

    Raises:
        UnsupportedError: for a norm over several dimensions.
    """
    dims = normed_axes(node, program_axes)
    if len(dims) != 1:
        raise UnsupportedError(f"{target_text(node.target)} ('{node.name}') runs over {len(dims)} dimensions")
    kept = mask(dims[0])
    if node.target is aten.rms_norm.default:
        _rescale(edit, node, kept)
    else:
        _pad(edit, node, kept)


def _rescale(edit: Editor, node: fx.Node, kept: torch.Tensor) -> None:
    size, ratio = int(kept.sum()), len(kept) / int(kept.sum())
    weight, eps = Norm(node).weight, Norm(node).eps
    if eps is None:
        eps = torch.finfo(nodes.tensor_type(node).dtype).eps
    root = math.sqrt(ratio)
    with edit.before(node):
        if weight is None:
            typed = nodes.tensor_type(node)
            ones = torch.full((size,), root, dtype=typed.dtype, device=typed.device)
            weight = edit.weight(f"{node.name}.weight", ones)
        elif is_own_weight(weight):
            edit.set_weight(weight, edit.tensor(weight) * root, retype=False)
        elif weight.op == "get_attr":
            weight = edit.weight(str(weight.target), edit.like(weight, edit.tensor(weight)[kept] * root))
        else:
            # Typed with the sizes before the removal, like all nodes at that time.
            weight = edit.call(aten.mul.Tensor, weight, root)
    nodes.set_arguments(node, Norm(node).x, [size], weight, eps * ratio)


def _pad(edit: Editor, node: fx.Node, kept: torch.Tensor) -> None:
    """Pad zeros before a layer norm, and slice them off after it; its node becomes the slice."""
    whole, size = len(kept), int(kept.sum())
    norm = Norm(node)
    weight, bias = nodes.argument(node, "weight"), nodes.argument(node, "bias")
    if not all(read is None or (isinstance(read, fx.Node) and read.op == "get_attr") for read in (weight, bias)):
        raise UnsupportedError(f"{target_text(node.target)} ('{node.name}') has a computed weight")
    order = torch.cat([kept.nonzero().flatten(), (~kept).nonzero().flatten()])
    with edit.before(node):
        # The remaining indices come first.
        operands = [
            edit.weight(str(read.target), edit.like(read, edit.tensor(read)[order])) if isinstance(read, fx.Node) else None
            for read in (weight, bias)
        ]
        # Nodes still have the sizes before the removal, so the padded size would be wrong until all are retyped.
        padded = _untyped(edit, aten.constant_pad_nd.default, node, norm.x, [0, whole - size])
        normed = _untyped(edit, aten.layer_norm.default, node, padded, [whole], *operands, norm.eps)
    node.target = aten.slice.Tensor
    node.args, node.kwargs = (normed, nodes.tensor_type(node).rank - 1, 0, size), {}


def _untyped(edit: Editor, target: torch._ops.OpOverload, like: fx.Node, *args: object) -> fx.Node:
    """A call that cannot be typed before all sizes are corrected; until then it gets the type of `like`."""
    node = edit.program.graph.create_node("call_function", target, name=target._schema.name.partition("::")[2])
    nodes.set_arguments(node, *args)
    nodes.set_origin(node, nodes.origin(like).changed_by(edit.pass_name))
    nodes.set_value(node, nodes.value(like))
    return node
