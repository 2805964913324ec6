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
from typing import cast

import torch
from torch import fx, nn

from lissom.compiler.analysis.axes.axes import Axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.printer import target_text
from lissom.errors import UnsupportedError

aten = torch.ops.aten

Mask = Callable[[Axis], torch.Tensor]


def normed_axes(node: fx.Node, found: Axes) -> tuple[Axis, ...]:
    """The axes that a norm reduces."""
    count = len(cast("list[int]", node.args[1]))
    return cast("tuple[Axis, ...]", found.of[node])[-count:]


def follow_norm(edit: Editor, node: fx.Node, found: Axes, mask: Mask) -> None:
    """Change a norm so that its output at the remaining indices does not change. mask: which indices of an axis stay.

    Raises: UnsupportedError for a norm over several dimensions.
    """
    dims = normed_axes(node, found)
    if len(dims) != 1:
        raise UnsupportedError(f"{target_text(node.target)} ('{node.name}') runs over {len(dims)} dimensions")
    kept = mask(dims[0])
    if node.target is aten.rms_norm.default:
        _rescale(edit, node, kept)
    else:
        _pad(edit, node, kept)


def _rescale(edit: Editor, node: fx.Node, kept: torch.Tensor) -> None:
    size, ratio = int(kept.sum()), len(kept) / int(kept.sum())
    weight, eps = nodes.argument(node, "weight"), nodes.argument(node, "eps")
    if eps is None:
        eps = torch.finfo(nodes.tensor_type(node).dtype).eps
    x = node.args[0]
    with edit.before(node):
        if not isinstance(weight, fx.Node):
            typed = nodes.tensor_type(node)
            weight = edit.weight(
                f"{node.name}.weight", torch.full((size,), math.sqrt(ratio), dtype=typed.dtype, device=typed.device)
            )
        elif weight.op == "get_attr" and len(weight.users) == 1:
            edit.set_weight(weight, _values(edit, weight) * math.sqrt(ratio), retype=False)
        elif weight.op == "get_attr":
            weight = edit.weight(str(weight.target), _like(edit, weight, _values(edit, weight)[kept] * math.sqrt(ratio)))
        else:
            weight = _scaled(edit, weight, math.sqrt(ratio))
    node.args, node.kwargs = (x, [size], weight, cast(float, eps) * ratio), {}


def _scaled(edit: Editor, weight: fx.Node, factor: float) -> fx.Node:
    """A computed weight times a factor; it is typed with the sizes before the removal, like all nodes at that time."""
    return edit.call(aten.mul.Tensor, weight, factor)


def _pad(edit: Editor, node: fx.Node, kept: torch.Tensor) -> None:
    """Pad zeros before a layer norm, and slice them off after it; its node becomes the slice."""
    whole, size = len(kept), int(kept.sum())
    x, eps = cast(fx.Node, node.args[0]), nodes.argument(node, "eps")
    weight, bias = nodes.argument(node, "weight"), nodes.argument(node, "bias")
    if not all(item is None or (isinstance(item, fx.Node) and item.op == "get_attr") for item in (weight, bias)):
        raise UnsupportedError(f"{target_text(node.target)} ('{node.name}') has a computed weight")
    order = torch.cat([kept.nonzero().flatten(), (~kept).nonzero().flatten()])
    with edit.before(node):
        operands = [_moved(edit, item, order) for item in (weight, bias)]
        # Nodes still have the sizes before the removal, so the padded size would be wrong until all are retyped.
        padded = _untyped(edit, aten.constant_pad_nd.default, node, x, [0, whole - size])
        normed = _untyped(edit, aten.layer_norm.default, node, padded, [whole], *operands, eps)
    node.target = aten.slice.Tensor
    node.args, node.kwargs = (normed, nodes.tensor_type(node).rank - 1, 0, size), {}


def _untyped(edit: Editor, target: torch._ops.OpOverload, like: fx.Node, *args: object) -> fx.Node:
    """A call that cannot be typed before all sizes are corrected; until then it gets the type of `like`."""
    node = edit.program.graph.create_node("call_function", target, args, {}, target._schema.name.partition("::")[2])  # pyright: ignore
    nodes.set_origin(node, nodes.origin(like).changed_by(edit.pass_name))
    nodes.set_value(node, nodes.value(like))
    return node


def _moved(edit: Editor, item: object, order: torch.Tensor) -> fx.Node | None:
    """A weight of a norm, reordered so that the remaining indices come first."""
    if not isinstance(item, fx.Node):
        return None
    return edit.weight(str(item.target), _like(edit, item, _values(edit, item)[order]))


def _values(edit: Editor, item: fx.Node) -> torch.Tensor:
    return edit.program.weight(str(item.target)).detach()


def _like(edit: Editor, item: fx.Node, values: torch.Tensor) -> torch.Tensor:
    """The values as a parameter if the original weight is one."""
    old = edit.program.weight(str(item.target))
    return nn.Parameter(values, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else values
