"""ONNX operators converted here rather than by onnx2fx: those whose sizes must stay symbolic, and those a pass looks for.

Each has a function of the PyTorch it stands for and a place in `TABLE`. They are registered with onnx2fx under a domain of our
own, so that what else uses that package in the process is not affected. Meanings are those of the ONNX operator reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.nn import functional

from lissom.frontends.sizes import numbers_of

if TYPE_CHECKING:
    import onnx
    from onnx2fx.graph_builder import GraphBuilder

DOMAIN = "lissom"


def reshape(x: torch.Tensor, shape: torch.Tensor, *, allowzero: int = 0) -> torch.Tensor:
    """A size of 0 stands for the input's own, unless `allowzero`; -1 for what is left."""
    sizes = shape.tolist()
    if not allowzero:
        sizes = [x.shape[index] if type(size) is int and size == 0 else size for index, size in enumerate(sizes)]
    return x.reshape(sizes)


def expand(x: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    """Broadcast both ways: a size of 1 keeps the input's own."""
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
    """The elements from start up to, and without, end, along each axis; both may count from the back."""
    first, last = starts.tolist(), ends.tolist()
    along = list(range(len(first))) if axes is None else axes.tolist()
    by = [1] * len(first) if steps is None else steps.tolist()
    for start, end, axis, step in zip(first, last, along, by, strict=True):
        if step < 0:
            x = x.flip(axis)
            start, end, step = _from_the_back(start), _from_the_back(end), -step
        x = _slice(x, axis, start, end, step)
    return x


def _from_the_back(position: int) -> int:
    """The same place counted on the reversed axis: element i of n is element n - 1 - i, written -1 - i."""
    return -1 - position


def _slice(x: torch.Tensor, axis: int, start: Any, end: Any, step: int) -> torch.Tensor:  # noqa: ANN401
    """A slice that is left out where it is the whole axis, as exporters write one for every `x[:, :n]`."""
    whole = type(start) is int and start == 0 and step == 1
    if whole and (type(end) is int and end >= 2**31 - 1 or _is_same(end, x.shape[axis])):
        return x
    return torch.ops.aten.slice.Tensor(x, axis, start, end, step)


def _is_same(left: object, right: object) -> bool:
    """True when two sizes are equal for every value of their symbols; asks nothing of the sizes."""
    if isinstance(left, torch.SymInt) and isinstance(right, torch.SymInt):
        return left.node.expr == right.node.expr
    return type(left) is int and type(right) is int and left == right


def tile(x: torch.Tensor, repeats: torch.Tensor) -> torch.Tensor:
    return x.repeat(repeats.tolist())


def pad(
    x: torch.Tensor,
    pads: torch.Tensor,
    value: torch.Tensor | None = None,
    axes: torch.Tensor | None = None,
    *,
    mode: str = "constant",
) -> torch.Tensor:
    """Elements added before (first half of `pads`) and after (second half) each axis."""
    amounts = pads.tolist()
    count = len(amounts) // 2
    along = list(range(count)) if axes is None else [axis % x.dim() for axis in axes.tolist()]
    around = dict(zip(along, zip(amounts[:count], amounts[count:], strict=True), strict=True))
    flat = [size for axis in reversed(range(x.dim())) for size in around.get(axis, (0, 0))]
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    if mode == "constant":
        return functional.pad(x, flat, value=0.0 if value is None else value.item())
    return functional.pad(x, flat, mode={"edge": "replicate", "wrap": "circular"}.get(mode, mode))


def gather(x: torch.Tensor, indices: torch.Tensor, *, axis: int = 0) -> torch.Tensor:
    """The slices of `x` at the indices, in the indices' shape. Rows of a floating-point table are an embedding."""
    known = numbers_of(indices)
    if indices.dim() == 0 and known is not None:
        return x.select(axis, known.item())
    if axis == 0 and x.dim() == 2 and x.is_floating_point() and indices.dim() > 0:
        return functional.embedding(indices, x)
    around = (slice(None),) * (axis % x.dim())
    return x[(*around, indices)] if indices.dim() > 0 else x[(*around, indices.reshape(1))].squeeze(axis)


def gather_nd(x: torch.Tensor, indices: torch.Tensor, *, batch_dims: int = 0) -> torch.Tensor:
    """The slices of `x` at the points in the last dimension of `indices`, after `batch_dims` dimensions both have."""
    rows = [
        torch.arange(x.shape[dim], device=x.device).reshape([-1 if other == dim else 1 for other in range(indices.dim() - 1)])
        for dim in range(batch_dims)
    ]
    return x[(*rows, *indices.long().unbind(-1))]


def rms_normalization(x: torch.Tensor, scale: torch.Tensor, *, axis: int = -1, epsilon: float = 1e-5, **_: int) -> torch.Tensor:
    """x / sqrt(mean(x²) + epsilon) · scale, over the dimensions from `axis` on."""
    return functional.rms_norm(x, x.shape[axis % x.dim() :], scale, epsilon)


def layer_normalization(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, **_: int
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + epsilon) · scale + bias, over the dimensions from `axis` on."""
    return functional.layer_norm(x, x.shape[axis % x.dim() :], scale, bias, epsilon)


Function = Callable[..., torch.Tensor]

TABLE: Mapping[str, Function] = {
    "Reshape": reshape,
    "Expand": expand,
    "Slice": slices,
    "Tile": tile,
    "Pad": pad,
    "Gather": gather,
    "GatherND": gather_nd,
    "RMSNormalization": rms_normalization,
    "LayerNormalization": layer_normalization,
    "Linear": functional.linear,
}
"""Operators by their ONNX names, and `Linear`, x weightᵀ + bias. Inputs are positional, attributes keywords."""

OLDEST: Mapping[str, int] = {"Reshape": 5, "Slice": 10, "Tile": 6, "Pad": 11, "Expand": 8}
"""The first opset in which the operator takes what our function takes; before it, onnx2fx converts it."""


def is_ours(name: str, domain: str, opset: int) -> bool:
    """True for an operator of `TABLE` in this opset. Each gives one output, the first."""
    return name in TABLE and domain in ("", "ai.onnx") and opset >= OLDEST.get(name, 1)


def register() -> None:
    """Give our operators to onnx2fx, in our domain; as often as one likes."""
    from onnx2fx import register_op

    for name, function in TABLE.items():
        register_op(name, _handler(function), DOMAIN)


def _handler(function: Function) -> Callable[[GraphBuilder, onnx.NodeProto], fx.Node]:
    def handle(builder: GraphBuilder, node: onnx.NodeProto) -> fx.Node:
        from onnx.helper import get_attribute_value

        inputs: Sequence[fx.Node | None] = [builder.get_value(name) if name else None for name in node.input]
        attributes = {item.name: get_attribute_value(item) for item in node.attribute}
        plain = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
        return builder.call_function(function, inputs, plain)

    return handle
