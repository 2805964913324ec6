"""Pack linear layers with sparse weights for kernels that skip the zeros, where that is measured faster.

On a CPU whole blocks are skipped, 4 neighbouring inputs of a panel of 32 output features, as `sparsify{pattern=block}` leaves
them.

    linear(x, W, b), quantized_linear(x, W, …)  ->  block_sparse_linear(x, W, …), block_sparse_quantized_linear(x, W, …)

W is in float32, bfloat16, or in int8 with a scale a feature, and one a row or in all of the activations (`int8-dynamic`,
`int8-static`).

On CUDA 2:4 sparse weights go to the sparse tensor cores, `lissom::sparse_linear`: two of every four neighbouring weights are
skipped, which halves the arithmetic and nearly halves the bytes of the weight. It needs compute capability 8.0 to 8.9, bfloat16
or float16, and weights whose sizes are multiples of 32 and 64; NVIDIA 2020, A100 Tensor Core GPU Architecture, section on
structured sparsity. On a CPU that operator unpacks the weight at every call.

Whether a layer becomes faster depends on its sizes and the machine, so by default one of each size and fraction of zeros is
timed both ways at the sizes of the example. Dense layers are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx
from torch.nn import functional

from lissom.compiler.analysis.cost import example_shape
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Linear
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.measure.timing import GAIN, median_seconds
from lissom.ops.block_sparse_linear import (
    BLOCK,
    block_sparse_linear,
    block_sparse_quantized_linear,
    nonzero_blocks,
    pack_nonzero_blocks,
)
from lissom.ops.epilogue import PANEL
from lissom.ops.native import missing_kernel
from lissom.ops.packed_linear import pack as pack_dense
from lissom.ops.packed_linear import packed_linear
from lissom.ops.quantized_linear import quantized_linear
from lissom.ops.sparse_linear import COLUMNS, DTYPES, ROWS, is_two_in_four, pack, sparse_linear

aten = torch.ops.aten

_MOST_STORED = 0.8
"""Of a weight's blocks; with more a layer is dense."""


@dataclass(frozen=True)
class PackSparse(Rewrite):
    """Lowers linear layers with sparse weights to kernels that skip the zeros, where that is measured faster.

    Attributes:
        always: lowers without measuring, and 2:4 weights on any device.
    """

    always: bool = False

    def run(self, edit: Editor) -> None:
        packed: dict[str, list[fx.Node]] = {}
        timed: dict[Hashable, str | None] = {}
        # All layers are looked at before the first is packed.
        for node in edit.nodes(*Linear.targets, quantized_linear):
            edit.current = node
            layer = _Blocks.of(edit, node) or _TwoInFour.of(edit, node, any_device=self.always)
            if layer is None:
                continue
            reason = layer.obstacle
            if reason is None and not self.always:
                if layer.form not in timed:
                    timed[layer.form] = layer.slower()
                reason = timed[layer.form]
            if not edit.may_change(node, reason):
                continue
            name = str(layer.weight.target)
            with edit.before(node):
                if name not in packed:
                    packed[name] = [edit.weight(f"{name}_{leaf}", tensor) for leaf, tensor in layer.pack().items()]
                call = edit.call(layer.kernel, *layer.operands(packed[name]), **layer.options())
            edit.replace(node, call)


@dataclass
class _Layer:
    """A linear layer with a sparse weight.

    Attributes:
        tensor: the weight, of a quantized layer packed.
        obstacle: the reason it cannot be packed.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    tensor: torch.Tensor
    obstacle: str | None

    def example(self) -> torch.Tensor:
        """Random numbers of the sizes of x in the example."""
        x = nodes.tensor_type(self.x)
        return torch.randn(example_shape(self.x), device=x.device).to(x.dtype)

    @property
    def form(self) -> Hashable:
        """What the time of the layer depends on."""
        sizes = example_shape(self.x), self.tensor.shape, self.tensor.dtype
        return type(self), self.node.target, *sizes, round(20 * float(self.tensor.count_nonzero()) / self.tensor.numel())

    def compare(self, form: str, packed: Callable[[], object], dense: Callable[[], object]) -> str | None:
        """The measured times, where packing does not make the layer faster."""
        with torch.inference_mode():
            ours, theirs = median_seconds(packed), median_seconds(dense)
        return None if ours <= GAIN * theirs else f"{form} it takes {1e3 * ours:.3g} ms, dense {1e3 * theirs:.3g} ms"


class _Blocks(_Layer):
    """A layer on a CPU of which whole blocks of the weight are zero."""

    @classmethod
    def of(cls, edit: Editor, node: fx.Node) -> _Blocks | None:
        """The layer of a call; None for one with a dense weight, or one that no kernel takes."""
        quantized = node.target is quantized_linear
        x, weight = (nodes.operand(node, index) for index in range(2)) if quantized else (Linear(node).x, Linear(node).weight)
        if weight.op != "get_attr" or missing_kernel((form := nodes.tensor_type(x)).dtype, form.device):
            return None
        tensor = edit.tensor(weight)
        if quantized and (nodes.tensor_type(nodes.operand(node, 2)).rank != 1 or _granularity(node) == "group"):
            return None
        if not quantized and (tensor.dtype != form.dtype or tensor.dim() != 2 or tensor.shape[1] % BLOCK):
            return None
        # Of a dense weight one panel is read.
        if not _has_zero_blocks(tensor[:1] if quantized else pack_dense(tensor[:PANEL])):
            return None
        if not _has_zero_blocks(tensor if quantized else pack_dense(tensor)):
            return None
        shared = any(user.target is not node.target for user in weight.users)
        return cls(node, x, weight, tensor, "its weight has zero blocks, but is read elsewhere too" if shared else None)

    @property
    def kernel(self) -> torch._ops.OpOverload:
        return block_sparse_quantized_linear if self.is_quantized else block_sparse_linear

    @property
    def is_quantized(self) -> bool:
        return self.node.target is quantized_linear

    @property
    def dense(self) -> torch.Tensor:
        """The packed weight with its zeros."""
        return self.tensor if self.is_quantized else pack_dense(self.tensor)

    def pack(self) -> dict[str, torch.Tensor]:
        """The operands that hold the weight, by the suffixes of their names."""
        return dict(zip(("blocks", "places", "ends"), pack_nonzero_blocks(self.dense), strict=True))

    def operands(self, packed: list[fx.Node]) -> list[object]:
        """Those of the kernel."""
        if not self.is_quantized:
            return [self.x, *packed, Linear(self.node).bias]
        names = ("scale", "sums", "x_scale", "x_zero_point", "bias", "other")
        return [self.x, *packed, *(nodes.argument(self.node, name) for name in names)]

    def options(self) -> dict[str, object]:
        """The keyword arguments of the kernel."""
        return dict(self.node.kwargs) if self.is_quantized else {"features": nodes.tensor_type(self.weight).shape[0]}

    def slower(self) -> str | None:
        """The measured times, where packing does not make the layer faster. Random scales and sums do as well as its own."""
        x, dense = self.example(), self.dense
        packed = pack_nonzero_blocks(dense)
        if not self.is_quantized:
            features = len(self.tensor)
            sparse = partial(block_sparse_linear, x, *packed, features=features)
            reasons = (
                self.compare("without zero blocks", sparse, partial(packed_linear, x, dense, features=features)),
                self.compare("without zero blocks", sparse, partial(functional.linear, x, self.tensor)),
            )
            return reasons[0] or reasons[1]
        features = PANEL * len(dense)
        grid = torch.ones(features), torch.ones(features, dtype=torch.int32)
        known = () if nodes.argument(self.node, "x_scale") is None else (torch.tensor(0.01),)
        options = {"features": features, "granularity": _granularity(self.node)}
        sparse = partial(block_sparse_quantized_linear, x, *packed, *grid, *known, **options)
        return self.compare("without zero blocks", sparse, partial(quantized_linear, x, dense, *grid, *known, **options))


class _TwoInFour(_Layer):
    """A layer with a 2:4 sparse weight."""

    kernel = sparse_linear

    @classmethod
    def of(cls, edit: Editor, node: fx.Node, *, any_device: bool) -> _TwoInFour | None:
        """The layer of a call; None for one with a dense weight."""
        if node.target not in Linear.targets:
            return None
        layer = Linear(node)
        if layer.weight.op != "get_attr" or not is_two_in_four(edit.tensor(layer.weight)):
            return None
        return cls(node, layer.x, layer.weight, edit.tensor(layer.weight), _obstacle(layer, any_device=any_device))

    def pack(self) -> dict[str, torch.Tensor]:
        """The operands that hold the weight, by the suffixes of their names."""
        return dict(zip(("values", "places"), pack(self.tensor), strict=True))

    def operands(self, packed: list[fx.Node]) -> list[object]:
        """Those of the kernel."""
        return [self.x, *packed, Linear(self.node).bias]

    def options(self) -> dict[str, object]:
        """The keyword arguments of the kernel: none."""
        return {}

    def slower(self) -> str | None:
        """The measured times, where packing does not make the layer faster."""
        x = self.example()
        return self.compare(
            "packed 2:4", partial(sparse_linear, x, *pack(self.tensor)), partial(functional.linear, x, self.tensor)
        )


def _granularity(node: fx.Node) -> object:
    return nodes.argument(node, "granularity")


def _has_zero_blocks(packed: torch.Tensor) -> bool:
    return packed.numel() > 0 and float(nonzero_blocks(packed).float().mean()) <= _MOST_STORED


def _obstacle(layer: Linear, *, any_device: bool) -> str | None:
    """The reason a layer with a 2:4 weight cannot be packed; None if it can."""
    x, weight = nodes.tensor_type(layer.x), nodes.tensor_type(layer.weight)
    if any(user.target is not aten.linear.default for user in layer.weight.users):
        return "its weight is read elsewhere too"
    if x.device.type != "cuda" and not any_device:
        return "its weight is 2:4, which makes it no faster on a CPU"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] != 8:
        return "its weight is 2:4, for which PyTorch has kernels on compute capability 8.0 to 8.9 only"
    if weight.dtype not in DTYPES or x.dtype != weight.dtype:
        return "its weight is 2:4, which is fast in bfloat16 and float16 only: put cast before"
    if nodes.fixed_size(weight, 0) % ROWS or nodes.fixed_size(weight, 1) % COLUMNS:
        return f"its weight is 2:4, but its sizes are no multiples of {ROWS} and {COLUMNS}"
    return None
