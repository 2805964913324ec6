"""One rule an operator: how the axes of its result come from those of its arguments."""

from __future__ import annotations

import functools
import operator
from typing import cast

import torch
from torch import fx

from lissom.compiler.analysis.axes import views
from lissom.compiler.analysis.axes.axis import Axis, cut, divide, mark_normed, mark_whole, pin, product, unify
from lissom.compiler.analysis.axes.base import Dims, Known, Rule, Value, broadcast, dim_of, fresh, of, tensors, unknown
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.match import register
from lissom.compiler.ir.printer import target_text
from lissom.compiler.ir.types import TensorType

aten = torch.ops.aten


def apply(node: fx.Node, known: Known) -> Value:
    """The axes of what a call yields; without a rule, everything it touches is pinned."""
    rule = RULES.get(str(node.target))
    if rule is None:
        tags = getattr(node.target, "tags", ())
        rule = _pointwise if torch.Tag.pointwise in tags or _same_shapes(node) else unknown
    found = rule(node, known)
    _check(node, found)
    return found


def read_sizes(node: fx.Node, known: Known) -> None:
    """A size read while the program runs follows its axis by itself; a value read (`item`) does not."""
    if node.target is aten.sym_size.int:
        return
    for used in node.all_input_nodes:
        for axis in known.get(used, ()):
            if isinstance(axis, Axis):
                pin(axis, f"read by {target_text(node.target)}")


def _check(node: fx.Node, found: Value) -> None:
    """Every rule gives an axis of the right size for each dimension, or it is wrong."""
    typed = nodes.node_type(node)
    if not isinstance(typed, TensorType):
        return
    sizes = [axis.size for axis in found if isinstance(axis, Axis)]
    static = [(have, want) for have, want in zip(sizes, typed.shape, strict=True) if isinstance(want, int)]
    assert all(not isinstance(have, int) or have == want for have, want in static), f"axes of {node.format_node()}: {sizes}"


def _same_shapes(node: fx.Node) -> bool:
    """True for operators named `…_like` and casts, whose result has the shape of their first argument."""
    name = str(getattr(node.target, "__name__", ""))
    return name.split(".")[0].endswith("_like")


def _pointwise(node: fx.Node, known: Known) -> Value:
    return broadcast(tensors(node, known), len(nodes.tensor_type(node).shape), target_text(node.target))


def _first(node: fx.Node, known: Known) -> Value:
    return of(node.args[0], known)


def _linear(node: fx.Node, known: Known) -> Value:
    x, weight = of(node.args[0], known), of(node.args[1], known)
    unify(x[-1], weight[1], "contracted by linear")
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if bias is not None:
        unify(of(bias, known)[0], weight[0], "a bias of linear")
    return (*x[:-1], weight[0])


def _matmul(node: fx.Node, known: Known) -> Value:
    return contract(of(node.args[0], known), of(node.args[1], known))


def contract(left: Dims, right: Dims) -> Dims:
    """The axes of a matrix product."""
    if len(right) == 1:
        unify(left[-1], right[0], "contracted by matmul")
        return left[:-1]
    unify(left[-1], right[-2], "contracted by matmul")
    if len(left) == 1:
        return (*right[:-2], right[-1])
    batch = broadcast([left[:-2], right[:-2]], max(len(left), len(right)) - 2, "matmul")
    return (*batch, left[-2], right[-1])


def _added_product(node: fx.Node, known: Known) -> Value:
    found = contract(of(node.args[1], known), of(node.args[2], known))
    return broadcast([of(node.args[0], known), found], len(found), target_text(node.target))


def _embedding(node: fx.Node, known: Known) -> Value:
    weight, ids = of(node.args[0], known), of(node.args[1], known)
    pin(weight[0], "rows of an embedding are looked up by number")
    return (*ids, weight[1])


def reduced_dims(node: fx.Node, rank: int) -> set[int]:
    """The dimensions a reduction removes."""
    # Norms have their order in front of the dimensions.
    index = 2 if node.target in (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim) else 1
    found = node.args[index] if len(node.args) > index else node.kwargs.get("dim")
    if found is None or found == []:
        return set(range(rank))
    return {cast(int, dim) % rank for dim in (found if isinstance(found, (list, tuple)) else [found])}


def _reduce(node: fx.Node, known: Known, whole: bool = True) -> Value:
    dims = of(node.args[0], known)
    removed = reduced_dims(node, len(dims))
    for index in removed if whole else ():
        mark_whole(dims[index])
    keep = len(nodes.tensor_type(node).shape) == len(dims)
    kept = [Axis(1) if index in removed else axis for index, axis in enumerate(dims)]
    return tuple(axis for index, axis in enumerate(kept) if keep or index not in removed)


def _sum(node: fx.Node, known: Known) -> Value:
    return _reduce(node, known, whole=False)


def _scan(node: fx.Node, known: Known) -> Value:
    dims = of(node.args[0], known)
    mark_whole(dims[dim_of(node, 1, len(dims))])
    return dims


def _normalise(node: fx.Node, known: Known) -> Value:
    dims = of(node.args[0], known)
    count = len(cast("list[int]", node.args[1]))
    for item in node.args[2:4]:
        if nodes.is_tensor(item):
            for axis, other in zip(dims[-count:], of(item, known), strict=True):
                unify(axis, other, "a weight of a norm")
    for axis in dims[-count:]:
        mark_normed(axis)
    return dims


def _batch_norm(node: fx.Node, known: Known) -> Value:
    dims = of(node.args[0], known)
    for item in node.args[1:5]:
        if nodes.is_tensor(item):
            unify(dims[1], of(item, known)[0], "a weight of a norm")
    return dims


def _group_norm(node: fx.Node, known: Known) -> Value:
    dims = of(node.args[0], known)
    for used in node.all_input_nodes:
        for axis in of(used, known)[:2]:
            pin(axis, "normalised in groups")
    return dims


def _attention(node: fx.Node, known: Known) -> Value:
    q, k, v = (of(item, known) for item in node.args[:3])
    keys = k[len(k) - 2]
    unify(q[-1], k[-1], "contracted by attention")
    unify(keys, v[len(v) - 2], "attended over")
    mark_whole(keys)
    lead = broadcast([k[:-2], v[:-2]], len(k) - 2, "attention")
    if len(q) > 2 and len(lead) > 0 and q[-3].size != lead[-1].size:
        groups = divide(q[-3], lead[-1].size)
        if groups is None:
            pin(q[-3], "shared between key/value groups")
        else:
            unify(groups[0], lead[-1], "key/value groups")
        lead = (*broadcast([q[:-3], lead[:-1]], len(q) - 3, "attention"), q[-3])
    else:
        lead = broadcast([q[:-2], lead], len(q) - 2, "attention")
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    sinks = node.kwargs.get("sinks")
    if sinks is not None:
        broadcast([lead, of(sinks, known)[:-2]], len(lead), "attention sinks")
    if mask is not None:
        broadcast([(*lead, q[len(q) - 2], keys), of(mask, known)], len(q), "an attention mask")
    return (*lead, q[len(q) - 2], v[-1])


def _rotary(node: fx.Node, known: Known) -> Value:
    x, *tables = (of(item, known) for item in node.args[:3])
    width = x[-1].size
    pieces = None
    if isinstance(width, int):
        pieces = divide(x[-1], width // 2) if node.kwargs.get("interleaved") else cut(x[-1], width // 2)
    if pieces is None:
        pin(x[-1], "turned in pairs")
    elif node.kwargs.get("interleaved"):
        pin(pieces[1], "turned in pairs")
    else:
        unify(pieces[0], pieces[1], "turned in pairs")
    for table in tables:
        broadcast([x[:-1], table[:-1]], len(x) - 1, "rotary embedding")
        if table[-1].size == width:
            unify(x[-1], table[-1], "turned in pairs")
        elif pieces is not None:
            unify(pieces[0], table[-1], "turned in pairs")
    return x


def _grouped_product(node: fx.Node, known: Known) -> Value:
    """Rows times the matrix of their expert; which expert is told by number."""
    x, weight = of(node.args[0], known), of(node.args[1], known)
    unify(x[1], weight[1], "contracted by a grouped product")
    for dims in tensors(node, known):
        for axis in dims:
            pin(axis, f"no indices are taken from what {target_text(node.target)} reads")
    pin(weight[2], "the features of a grouped product")
    return (x[0], weight[2])


def _rounded(node: fx.Node, known: Known) -> Value:
    """Values rounded, or turned back: one for one, four-bit ones two for one along the last dimension."""
    q, *grid = (of(item, known) for item in node.args if nodes.is_tensor(item))
    sizes = nodes.tensor_type(node).shape
    last = q[-1] if q[-1].size == sizes[-1] else product([q[-1], Axis(2)])
    result = (*q[:-1], last)
    for dims in grid:
        for axis, whole in zip(dims, result, strict=bool(dims)):
            if axis.size == 1:
                continue
            blocks = (whole, None) if axis.size == whole.size else divide(whole, axis.size)
            if blocks is not None:
                unify(blocks[0], axis, "blocks of equal scale")
    for axis in (*result, *(item for dims in grid for item in dims)):
        pin(axis, f"no rule for {target_text(node.target)}")
    return result


def _convolution(node: fx.Node, known: Known) -> Value:
    x, weight = of(node.args[0], known), of(node.args[1], known)
    groups = nodes.argument(node, "groups")
    bias = nodes.argument(node, "bias")
    if bias is not None:
        unify(of(bias, known)[0], weight[0], "a bias of a convolution")
    if groups == 1:
        unify(x[1], weight[1], "contracted by a convolution")
    elif groups == x[1].size == weight[0].size:
        unify(x[1], weight[0], "the channels of a depthwise convolution")
    else:
        pin(x[1], "convolved in groups")
        pin(weight[0], "convolved in groups")
    for axis in (*x[2:], *weight[2:]):
        pin(axis, "convolved over")
    spatial = nodes.tensor_type(node).shape[2:]
    return (x[0], weight[0], *(Axis(size, pinned="convolved over") for size in spatial))


def _einsum(node: fx.Node, known: Known) -> Value:
    inputs, _, output = cast(str, node.args[0]).replace(" ", "").partition("->")
    operands = [of(item, known) for item in cast("list[fx.Node]", node.args[1])]
    if "." in inputs or not output or any(len(set(term)) != len(term) for term in inputs.split(",")):
        return unknown(node, known)
    letters: dict[str, Axis] = {}
    for term, dims in zip(inputs.split(","), operands, strict=True):
        for letter, axis in zip(term, dims, strict=True):
            unify(letters.setdefault(letter, axis), axis, f"'{letter}' of einsum")
    return tuple(letters[letter] for letter in output)


def _create(node: fx.Node, known: Known) -> Value:
    return fresh(nodes.node_type(node))


def _count(node: fx.Node, known: Known) -> Value:
    return fresh(nodes.node_type(node), "its values count positions")


RULES: dict[str, Rule] = {str(operator.getitem): views.getitem}

_register = functools.partial(register, RULES)

_register(_first, "dropout", "lift_fresh_copy", "log_sigmoid", "hardswish", "softplus", "bernoulli")
_register(_first, "_to_copy", "to.dtype", "to.dtype_layout", "to.device", "type_as", "contiguous", "clone", "detach", "alias")
_register(
    _pointwise,
    "__and__.Tensor",
    "__or__.Tensor",
    "where.ScalarOther",
    "where.ScalarSelf",
    "where.Scalar",
    "isin.Tensor_Scalar",
    "isclose",
    "lerp.Tensor",
)
_register(_linear, "linear")
_register(_matmul, "matmul", "mm", "bmm")
_register(_added_product, "addmm", "baddbmm")
_register(_embedding, "embedding")
_register(views.permute, "permute")
_register(views.transpose, "transpose.int", "t", "mT", "swapaxes", "swapdims", "numpy_T")
_register(views.unsqueeze, "unsqueeze")
_register(views.squeeze, "squeeze", "squeeze.dim", "squeeze.dims")
_register(views.reshape, "reshape", "view", "_unsafe_view", "flatten.using_ints", "unflatten.int", "reshape_as", "view_as")
_register(views.expand, "expand", "expand_as", "broadcast_to")
_register(views.repeat, "repeat")
_register(views.repeat_interleave, "repeat_interleave.self_int")
_register(views.cat, "cat", "concat", "concatenate")
_register(views.stack, "stack")
_register(views.split, "split.Tensor", "split_with_sizes", "split.sizes", "chunk", "tensor_split.sections")
_register(views.unbind, "unbind.int")
_register(views.select, "select.int")
_register(views.slice_of, "slice.Tensor")
_register(_sum, "sum.dim_IntList", "sum")
_register(_reduce, "mean.dim", "mean", "var.correction", "var.dim", "std.correction", "std.dim", "amax", "amin", "logsumexp")
_register(
    _reduce, "any.dim", "all.dim", "any", "all", "argmax", "argmin", "prod.dim_int", "linalg_vector_norm", "norm.ScalarOpt_dim"
)
_register(_scan, "softmax.int", "_softmax", "log_softmax.int", "_log_softmax", "cumsum", "cumprod")
_register(views.reorder, "flip", "roll", "tril", "triu", "rot90")
_register(_normalise, "layer_norm", "rms_norm")
_register(_batch_norm, "batch_norm")
_register(_group_norm, "group_norm")
_register(_attention, "scaled_dot_product_attention")
_register(_convolution, "conv1d", "conv2d", "conv3d", "conv1d.padding", "conv2d.padding")
_register(views.index_select, "index_select")
_register(views.index_copy, "index_copy", "index_copy_")
_register(views.copy, "copy_")
_register(views.gather, "gather", "take_along_dim")
_register(views.index, "index.Tensor")
_register(_einsum, "einsum")
_register(_create, "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "empty.memory_format", "scalar_tensor")
_register(_count, "arange", "arange.start", "arange.start_step", "linspace", "eye")
RULES["lissom.attention.default"] = _attention
RULES["lissom.linear_attention.default"] = _attention
RULES["lissom.rotary.default"] = _rotary
RULES["lissom.grouped_product.default"] = _grouped_product
for _name in ("fake_quantize", "fake_quantize_dynamic", "dequantize"):
    RULES[f"lissom.{_name}.default"] = _rounded
