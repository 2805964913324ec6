"""Norms without scale and bias, and whether the values that they read may be centred; see `residual`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from lissom.compiler.analysis.axes.axes import axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.dead_units import summed
from lissom.compiler.analysis.structure.linear import bias_of, input_of
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.calls import Embedding, Linear, Norm
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.match import is_own_weight
from lissom.compiler.ir.printer import place
from lissom.compiler.ir.program import Program
from lissom.compiler.transforms.channel_scaling import Reader, ScalingSite, scaling_site
from lissom.ops import change_basis

aten = torch.ops.aten


def without_scale(edit: Editor, norm: fx.Node) -> bool | str:
    """Fold the scale and bias of a norm into the layers that read it, or keep them behind it.

    Returns:
        True when the scale is kept as a matrix, False when nothing is left of it, or why the norm cannot be changed.
    """
    call, is_layer_norm = Norm(norm), norm.target is aten.layer_norm.default
    scale, bias = call.weight, nodes.argument(norm, "bias") if is_layer_norm else None
    if len(call.shape) != 1:
        return f"{place(edit.program, norm)} runs over several dimensions"
    if any(read is not None and (not isinstance(read, fx.Node) or read.op != "get_attr") for read in (scale, bias)):
        return f"{place(edit.program, norm)} has a computed scale"
    if scale is None and bias is None:
        return False
    if is_layer_norm:
        _untie(edit, norm)
    values = None if scale is None else edit.tensor(scale)
    shift = edit.tensor(bias) if isinstance(bias, fx.Node) else None
    site = scaling_site(edit.program, norm)
    if not isinstance(site, str) and _takes(site, norm, shift):
        for reader in site.readers:
            _fold(edit, site, reader, values, shift)
        edit.replace_by(norm, nodes.overload(norm), call.x, call.shape, None, *[None] * is_layer_norm, call.eps)
        return False
    path = nodes.origin(norm).module_path or norm.name
    with edit.before(norm):
        kept = edit.call(nodes.overload(norm), call.x, call.shape, None, *[None] * is_layer_norm, call.eps)
        if values is not None:
            kept = edit.call(change_basis, kept, edit.weight(f"{path}.scale", torch.diag(values)))
        if isinstance(bias, fx.Node):
            kept = edit.call(aten.add.Tensor, kept, bias)
    edit.replace(norm, kept)
    return values is not None


def _takes(site: ScalingSite, norm: fx.Node, shift: torch.Tensor | None) -> bool:
    """True when the layers of a site can take a norm's bias, whose product with their weights is added to their own."""
    if shift is None or not bool(shift.any()):
        return True
    views = _views(norm)
    for reader in site.readers:
        layer = reader.layer
        own = bias_of(layer)
        if input_of(layer) not in views or not bool((reader.channel >= 0).all()):
            return False
        if layer.target not in (aten.linear.default, aten.addmm.default) or not (own is None or is_own_weight(own)):
            return False
    return True


def _fold(edit: Editor, site: ScalingSite, reader: Reader, scale: torch.Tensor | None, shift: torch.Tensor | None) -> None:
    """W (g ⊙ x + b) = (W diag g) x + W b."""
    weight = reader.matrix.read(edit.program)
    if shift is not None and bool(shift.any()):
        columns = shift.double()[reader.channel.to(shift.device)]
        added = weight.double() @ columns.to(weight.device)
        own = bias_of(reader.layer)
        if own is not None:
            edit.set_weight(own, (edit.tensor(own).double() + added).to(weight.dtype))
        else:
            layer, path = Linear(reader.layer), nodes.origin(reader.layer).module_path or reader.layer.name
            with edit.before(reader.layer):
                bias = edit.weight(f"{path}.bias", edit.like(reader.matrix.node, added.to(weight.dtype)))
            edit.change_call(reader.layer, aten.linear.default, layer.x, layer.weight, bias)
    if scale is not None:
        reader.matrix.write(edit, (weight.double() * site.columns(reader, scale.double())).to(weight.dtype))


def _untie(edit: Editor, norm: fx.Node) -> None:
    """Give LM heads that read a norm, and whose weight is also an embedding table, a matrix of their own."""
    for head in [user for value in _views(norm) for user in value.users if Linear.of(user) is not None]:
        table = Linear(head).weight
        if table.op == "get_attr" and any(Embedding.of(user) is not None for user in table.users):
            values = edit.program.weight(str(table.target))
            alias = nn.Parameter(values.detach(), values.requires_grad) if isinstance(values, nn.Parameter) else values.detach()
            with edit.before(head, like=[table]):
                own = edit.weight(f"{nodes.origin(head).module_path}.weight_untied".lstrip("."), alias)
            head.replace_input_with(table, own)
            edit.program.edits += 1
            edit.note(f"'{own.target}' is a copy of the embedding table, because its LayerNorm is folded into it")


def _views(value: fx.Node) -> list[fx.Node]:
    """A value, and all views and selections of it."""
    views = [value]
    for view in views:
        views += [user for user in view.users if user.target in (*ops.SHAPES, aten.index.Tensor, aten.index_select.default)]
    return views


def shortcut_obstacle(program: Program, norms: Sequence[fx.Node]) -> str | None:
    """The reason a stream of post-norm blocks cannot be rotated; None where no LayerNorm stands between two residual adds.

    Args:
        norms: those over the channels of the stream.
    """
    sums = set(program.fact(structure).residuals)
    for norm in norms:
        readers = {user for view in _views(norm) for user in view.users}
        if norm.target is aten.layer_norm.default and Norm(norm).x in sums and not sums.isdisjoint(readers):
            return (
                f"{place(program, norm)} is a LayerNorm whose output is also the shortcut, so its scale and mean act on the "
                f"stream; use a model whose LayerNorms are on the branches, or rotate{{where=heads}}"
            )
    return None


def centring_obstacle(program: Program, stream: Axis, norms: Sequence[fx.Node]) -> str | None:
    """The reason what writes to a stream cannot be centred; None if all that reads it reads a norm of it.

    Args:
        norms: those over the channels of the stream, without scale and bias.
    """
    known = program.fact(axes)
    if plain := next((norm for norm in norms if norm.target is not aten.layer_norm.default), None):
        return f"{place(program, plain)} keeps the mean of the channels, and other norms of the stream subtract it"
    centred = set(norms)
    for node in program.nodes():
        operands = [value for value in node.all_input_nodes if value in known.of and _is_on(program, value, stream)]
        linear = node.target in _KEEPS_MEAN and all(value in centred for value in operands)
        if operands and linear:
            centred.add(node)
            continue
        for places in summed(node):
            data = [value for value, dim in places if value.op != "get_attr" and stream in known.axis(value, dim).atoms()]
            if data and not any(value in centred for value in data):
                return f"{place(program, node)} reads the stream without a LayerNorm, so the mean of its channels counts"
    return None


_KEEPS_MEAN = {*ops.SHAPES, *ops.MULTIPLY, *ops.DIVIDE, aten.mean.dim, aten.index.Tensor, aten.index_select.default, *ops.JOINS}
"""Operators whose result has channels of mean zero where those of the operands have."""


def _is_on(program: Program, value: fx.Node, stream: Axis) -> bool:
    """True when the channels of a value, its last dimension, are those of the stream."""
    return nodes.is_tensor(value) and nodes.tensor_type(value).rank > 0 and stream in program.fact(axes).axis(value, -1).atoms()
