"""Pack linear layers with 2:4 sparse weights for the sparse tensor cores of CUDA devices: `lissom::sparse_linear`.

Two of every four neighbouring weights are skipped, which halves the arithmetic and nearly halves the bytes of the weight.
Whether that makes a layer faster depends on its sizes and the device, so by default each is timed both ways at the sizes of the
example, and packed where that is faster. It needs compute capability 8.0 to 8.9, bfloat16 or float16, and weights whose sizes
are multiples of 32 and 64; NVIDIA 2020, A100 Tensor Core GPU Architecture, section on structured sparsity. Dense layers are
skipped. On other devices the pass is of no use: the operator unpacks the weight at every call.
"""

from __future__ import annotations

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
from lissom.ops.sparse_linear import COLUMNS, DTYPES, ROWS, is_two_in_four, pack, sparse_linear

aten = torch.ops.aten


@dataclass(frozen=True)
class PackSparse(Rewrite):
    """Lowers linear layers with 2:4 sparse weights to sparse tensor cores, where that is measured faster.

    Attributes:
        always: lowers without measuring, on any device.
    """

    always: bool = False

    def run(self, edit: Editor) -> None:
        packed: dict[str, tuple[fx.Node, fx.Node]] = {}
        # All layers are looked at before the first is packed.
        for layer in [Linear(node) for node in edit.nodes(*Linear.targets)]:
            node, weight = layer.node, layer.weight
            if weight.op != "get_attr" or not is_two_in_four(edit.tensor(weight)):
                continue
            edit.current = node
            reason = _obstacle(layer, any_device=self.always)
            if reason is None and not self.always:
                reason = _slower(layer, edit.tensor(weight))
            if not edit.may_change(node, reason):
                continue
            name = str(weight.target)
            with edit.before(node):
                if name not in packed:
                    values, places = pack(edit.tensor(weight))
                    packed[name] = edit.weight(f"{name}_values", values), edit.weight(f"{name}_places", places)
                call = edit.call(sparse_linear, layer.x, *packed[name], layer.bias)
            edit.replace(node, call)


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


def _slower(layer: Linear, weight: torch.Tensor) -> str | None:
    """The measured times, where packing does not make a layer faster."""
    x = torch.randn(example_shape(layer.x), device=weight.device).to(weight.dtype)
    packed = median_seconds(partial(sparse_linear, x, *pack(weight)))
    dense = median_seconds(partial(functional.linear, x, weight))
    return None if packed <= GAIN * dense else f"packed 2:4 it takes {1e3 * packed:.3g} ms, dense {1e3 * dense:.3g} ms"
