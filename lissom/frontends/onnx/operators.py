"""ONNX operators converted here rather than by onnx2fx.

Either their sizes must stay symbolic, or a pass matches them, or onnx2fx deviates from the standard. Each has a PyTorch
function in `TABLE`. They are registered with onnx2fx under Lissom's own domain, so that other users of that package in the
process are not affected. Semantics are those of the ONNX operator reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.nn import functional

from lissom.frontends.onnx.sizes import numbers_of, remember

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    from onnx2fx.graph_builder import GraphBuilder

DOMAIN = "lissom"

_FAR = 2**31 - 2
"""An end of a slice above this means "to the end"."""


def _dimension(x: torch.Tensor, axis: int) -> int:
    """The axis as a non-negative number. Raises IndexError if it is out of range."""
    if not -x.dim() <= axis < x.dim():
        raise IndexError(f"axis {axis} is given for {x.dim()} dimensions")
    return axis % x.dim()


def shape(x: torch.Tensor, *, start: int = 0, end: int | None = None) -> torch.Tensor:
    """The sizes of the dimensions from `start` to `end`, exclusive."""
    sizes = list(x.shape)[start:end]
    # Not torch.tensor, which writes in place when it is traced.
    elements = [torch.scalar_tensor(size, dtype=torch.int64) for size in sizes]
    return remember(torch.stack(elements) if elements else torch.empty(0, dtype=torch.int64), sizes)


def size_of(x: torch.Tensor) -> torch.Tensor:
    """The number of elements, as a tensor of rank 0."""
    count = x.numel()
    return remember(torch.scalar_tensor(count, dtype=torch.int64), [count])


def reshape(x: torch.Tensor, shape: torch.Tensor, *, allowzero: int = 0) -> torch.Tensor:
    """Reshape `x`; a size of 0 keeps the input's size unless `allowzero`, and -1 is inferred."""
    sizes = shape.tolist()
    if not allowzero:
        sizes = [x.shape[index] if type(size) is int and size == 0 else size for index, size in enumerate(sizes)]
    return x.reshape(sizes)


def expand(x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """Broadcast `x` and `shape` with each other: a size of 1 in `shape` keeps the input's size."""
    sizes = shape.tolist()
    rank = max(x.dim(), len(sizes))
    own = [1] * (rank - x.dim()) + list(x.shape)
    wanted = [1] * (rank - len(sizes)) + sizes
    return x.expand([mine if type(size) is int and size == 1 else size for mine, size in zip(own, wanted, strict=True)])


def slices(
    x: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    axes: torch.Tensor | None = None,
    steps: torch.Tensor | None = None,
) -> torch.Tensor:
    """The elements from start to end, exclusive, along each axis; both may be negative."""
    first, last = starts.tolist(), ends.tolist()
    along = list(range(len(first))) if axes is None else axes.tolist()
    by = [1] * len(first) if steps is None else steps.tolist()
    for start, end, axis, step in zip(first, last, along, by, strict=True):
        if step < 0:
            # Element i of n is element n - 1 - i of the reversed axis, written -1 - i.
            x = x.flip(axis)
            start, end, step = -1 - start, -1 - end, -step
        x = _slice(x, axis, start, end, step)
    return x


def _slice(x: torch.Tensor, axis: int, start: Any, end: Any, step: int) -> torch.Tensor:
    """A slice, or `x` itself if the slice is the whole axis: exporters write one for every `x[:, :n]`."""
    start = None if type(start) is int and (start == 0 or start < -_FAR) else start
    end = None if (type(end) is int and end > _FAR) or _is_same(end, x.shape[axis]) else end
    if start is None and end is None and step == 1:
        return x
    return x[(*(slice(None),) * _dimension(x, axis), slice(start, end, step))]


def _is_same(left: object, right: object) -> bool:
    """True if two sizes are equal for every value of their symbols; adds no guards."""
    if isinstance(left, torch.SymInt) and isinstance(right, torch.SymInt):
        return left.node.expr == right.node.expr
    return type(left) is int and type(right) is int and left == right


def tile(x: torch.Tensor, repeats: torch.Tensor) -> torch.Tensor:
    """The input repeated along each axis."""
    counts = repeats.tolist()
    if len(counts) != x.dim():
        raise ValueError(f"{len(counts)} repeats are given for {x.dim()} dimensions")
    return x.repeat(counts)


def pad(
    x: torch.Tensor,
    pads: torch.Tensor,
    value: torch.Tensor | None = None,
    axes: torch.Tensor | None = None,
    *,
    mode: str = "constant",
) -> torch.Tensor:
    """The input padded before (first half of `pads`) and after (second half) each axis."""
    amounts = pads.tolist()
    count = len(amounts) // 2
    along = list(range(count)) if axes is None else [_dimension(x, axis) for axis in axes.tolist()]
    if len(set(along)) != len(along) or (axes is None and count != x.dim()):
        raise ValueError(f"{len(amounts)} pads are given for the axes {along} of {x.dim()} dimensions")
    around = dict(zip(along, zip(amounts[:count], amounts[count:], strict=True), strict=True))
    flat = [size for axis in reversed(range(x.dim())) for size in around.get(axis, (0, 0))]
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    if mode == "constant":
        return functional.pad(x, flat, value=0.0 if value is None else value.item())
    return functional.pad(x, flat, mode={"edge": "replicate", "wrap": "circular"}.get(mode, mode))


def gather(x: torch.Tensor, indices: torch.Tensor, *, axis: int = 0) -> torch.Tensor:
    """The slices of `x` at the indices, in the indices' shape. Rows of a floating-point table become an embedding."""
    known = numbers_of(indices)
    if indices.dim() == 0 and known is not None:
        return x.select(axis, known.item())
    if axis == 0 and x.dim() == 2 and x.is_floating_point() and indices.dim() > 0:
        return functional.embedding(indices, x)
    around = (slice(None),) * _dimension(x, axis)
    return x[(*around, indices)] if indices.dim() > 0 else x[(*around, indices.reshape(1))].squeeze(axis)


def cumulative_sum(x: torch.Tensor, axis: torch.Tensor, *, exclusive: int = 0, reverse: int = 0) -> torch.Tensor:
    """Cumulative sums in the dtype of `x`: without the element itself if `exclusive`, from the end if `reverse`."""
    dim = int(axis.item())
    x = x.flip(dim) if reverse else x
    total = x.cumsum(dim, dtype=x.dtype)
    if exclusive:
        total = torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), total.narrow(dim, 0, x.shape[dim] - 1)], dim)
    return total.flip(dim) if reverse else total


def power(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """x raised to the exponent, in the dtype of `x`."""
    raised = torch.pow(x, exponent)
    return raised if raised.dtype is x.dtype else raised.to(x.dtype)


def swish(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    """x · sigmoid(alpha · x)."""
    return functional.silu(x) if alpha == 1.0 else x * (alpha * x).sigmoid()


def gather_nd(x: torch.Tensor, indices: torch.Tensor, *, batch_dims: int = 0) -> torch.Tensor:
    """The slices of `x` at the points in the last dimension of `indices`, after `batch_dims` dimensions both have."""
    if not 0 <= batch_dims < min(x.dim(), indices.dim()):
        raise ValueError(f"batch_dims is {batch_dims} for inputs of {x.dim()} and {indices.dim()} dimensions")
    rows = [
        torch.arange(x.shape[dim], device=x.device).reshape([-1 if other == dim else 1 for other in range(indices.dim() - 1)])
        for dim in range(batch_dims)
    ]
    return x[(*rows, *indices.long().unbind(-1))]


def rms_normalization(x: torch.Tensor, scale: torch.Tensor, *, axis: int = -1, epsilon: float = 1e-5, **_: int) -> torch.Tensor:
    """x / sqrt(mean(x²) + epsilon) · scale, over the dimensions from `axis` on."""
    return functional.rms_norm(x, x.shape[_dimension(x, axis) :], scale, epsilon)


def layer_normalization(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, **_: int
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + epsilon) · scale + bias, over the dimensions from `axis` on."""
    return functional.layer_norm(x, x.shape[_dimension(x, axis) :], scale, bias, epsilon)


def attention(*args: Any, **options: Any) -> torch.Tensor:
    """The first output of `attention_with_cache`."""
    return attention_with_cache(*args, **options)[0]


def attention_with_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    past_key: torch.Tensor | None = None,
    past_value: torch.Tensor | None = None,
    *,
    is_causal: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    q_num_heads: int = 0,
    kv_num_heads: int = 0,
    **_: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax(q kᵀ · scale + mask) v, and the keys and values with the past ones first.

    Args:
        q: [batch, heads, tokens, head_dim], or [batch, tokens, heads · head_dim] with the numbers of heads as attributes.
        k: likewise.
        v: likewise.
        is_causal: token i attends to the past and to tokens 0 to i.
        softcap: scores become softcap · tanh(score / softcap).
    """
    folded = q.dim() == 3
    if folded:
        q, k, v = _split_heads(q, q_num_heads), _split_heads(k, kv_num_heads), _split_heads(v, kv_num_heads)
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    grouped = bool(q.shape[1] != k.shape[1])
    if softcap:
        y = _capped(q, k, v, _combined_mask(q, k, mask, bool(is_causal), past), scale, softcap)
    elif is_causal and mask is None and past_key is None:
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        bias = _combined_mask(q, k, mask, bool(is_causal), past)
        y = functional.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=grouped)
    return (y.transpose(1, 2).flatten(2) if folded else y), k, v


def _split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _combined_mask(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, past: int
) -> torch.Tensor | None:
    """The mask, padded with hidden keys if it is shorter than the keys, and combined with the causal mask."""
    length = k.shape[2]
    if mask is not None and type(mask.shape[-1]) is int and type(length) is int and mask.shape[-1] < length:
        mask = functional.pad(mask, (0, length - mask.shape[-1]), value=_closed(mask))
    if not is_causal:
        return mask
    rows = torch.arange(q.shape[2], device=q.device)[:, None] + past
    open_to = torch.arange(length, device=q.device)[None] <= rows
    return open_to if mask is None else torch.where(open_to, mask, _closed(mask))


def _closed(mask: torch.Tensor) -> float | bool:
    return False if mask.dtype is torch.bool else float("-inf")


def _capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None, softcap: float
) -> torch.Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = (operand.repeat_interleave(repeats, 1) if repeats > 1 else operand for operand in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = (scores / softcap).tanh() * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1) @ v


Function = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]

TABLE: Mapping[str, Function] = {
    "Shape": shape,
    "Size": size_of,
    "Reshape": reshape,
    "Expand": expand,
    "Slice": slices,
    "Tile": tile,
    "Pad": pad,
    "Gather": gather,
    "GatherND": gather_nd,
    "CumSum": cumulative_sum,
    "Pow": power,
    "RMSNormalization": rms_normalization,
    "LayerNormalization": layer_normalization,
    "Attention": attention,
    "Swish": swish,
    "Linear": functional.linear,
}
"""Functions by ONNX operator, and `Linear`, x weightᵀ + bias. Inputs are positional, attributes are keywords."""

OLDEST: Mapping[str, int] = {"Reshape": 5, "Slice": 10, "Tile": 6, "Pad": 11, "Expand": 8}
"""The first opset in which the operator has our function's inputs; in earlier ones, onnx2fx converts it."""


WITH_MORE_OUTPUTS: Mapping[str, Function] = {"Attention": attention_with_cache}
"""Operators with more than one output, and the function that returns all of them."""

_ATTENTION = {"is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap", "softmax_precision"}
"""The attributes of Attention that our function supports; later opsets have more, and more inputs and outputs."""

WRONG: Mapping[str, int] = {
    **dict.fromkeys(("Attention", "Bernoulli", "ConvInteger", "DynamicQuantizeLinear", "EyeLike", "LpNormalization"), 1),
    **dict.fromkeys(("NonMaxSuppression", "QLinearMatMul", "Resize", "SoftmaxCrossEntropyLoss", "SpaceToDepth"), 1),
    **dict.fromkeys(("SplitToSequence", "Upsample"), 1),
    "QuantizeLinear": 21,
}
"""Operators that onnx2fx 0.0.1 converts wrongly by a node test of the standard, and the first opset concerned."""


def is_ours(node: ir.Node, opset: int) -> bool:
    """True for an operator of `TABLE` whose inputs, outputs and attributes in this opset our function supports."""
    name = node.op_type
    if name not in TABLE or node.domain not in ("", "ai.onnx") or opset < OLDEST.get(name, 1):
        return False
    used = max((place + 1 for place, output in enumerate(node.outputs) if output.uses() or output.is_graph_output()), default=0)
    if name != "Attention":
        return used <= 1
    return used <= 3 and len(node.inputs) <= 6 and not set(node.attributes) - _ATTENTION


def register() -> None:
    """Register our operators with onnx2fx, in our domain; repeated calls are allowed."""
    from onnx2fx import register_op

    for name, function in TABLE.items():
        register_op(name, _handler(function, WITH_MORE_OUTPUTS.get(name, function)), DOMAIN)


def _handler(one: Function, more: Function) -> Callable[[GraphBuilder, onnx.NodeProto], fx.Node]:
    def handle(builder: GraphBuilder, node: onnx.NodeProto) -> fx.Node:
        from onnx.helper import get_attribute_value

        inputs: Sequence[fx.Node | None] = [builder.get_value(name) if name else None for name in node.input]
        attributes = {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}
        plain = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
        return builder.call_function(one if len(node.output) == 1 else more, inputs, plain)

    return handle
