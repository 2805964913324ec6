"""Compute in bfloat16: products of matrices, embeddings and the residual stream; softmax and statistics stay in float32.

bfloat16 keeps float32's range and 8 of its 24 bits. Each operator falls into one of four groups:

- products, convolutions, attention, embeddings and norms run in bfloat16. Their kernels sum in float32, and norms and attention
  compute their statistics and softmax in float32 inside.
- element-wise operators and those that only move values follow what they are given: bfloat16 as soon as one of it is.
- softmax, exponentials, powers, sums and everything not named here run in float32, on values cast back.
- what is computed from positions or masks alone meets no bfloat16 value, and so stays as it is until it joins one.

Outputs are cast back, so the program answers in the dtypes it had. A mask that hides by a number is clamped to bfloat16's
lowest, which float32's would overflow.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from lissom.compiler import node as nodes
from lissom.compiler.editor import Editor
from lissom.compiler.errors import UnsupportedError
from lissom.compiler.kinds import Approximation
from lissom.compiler.match import RESHAPES, is_view
from lissom.ops.attention import attention
from lissom.ops.rotary import rotary

aten = torch.ops.aten

DTYPES = {"bf16": torch.bfloat16}

_LOW = {
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.embedding.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.group_norm.default,
    aten.scaled_dot_product_attention.default,
    attention,
}
_FOLLOWS = {
    *RESHAPES,
    operator.getitem,
    rotary,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Scalar,
    aten.mul.Scalar,
    aten.neg.default,
    aten.relu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.cat.default,
    aten.stack.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.index_select.default,
    aten.index.Tensor,
    aten.gather.default,
    aten.masked_fill.Scalar,
    aten.where.self,
    aten.maximum.default,
    aten.minimum.default,
    aten.clamp.default,
    aten.roll.default,
    aten.constant_pad_nd.default,
    aten.pad.default,
    aten.max_pool2d.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
}
_MASKS: dict[object, str] = {aten.scaled_dot_product_attention.default: "attn_mask", attention: "bias"}


@dataclass(frozen=True)
class Cast(Approximation):
    """Computes in a shorter floating type.

    dtype: `bf16`.
    """

    dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UnsupportedError(f"cast{{dtype={self.dtype}}} is not known; choose {', '.join(DTYPES)}")

    def run(self, edit: Editor) -> None:
        _Caster(edit, DTYPES[self.dtype]).run()


@dataclass
class _Caster:
    edit: Editor
    low: torch.dtype
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = field(default_factory=dict[tuple[fx.Node, torch.dtype], fx.Node])
    changed: set[fx.Node] = field(default_factory=set[fx.Node])

    def run(self) -> None:
        program = self.edit.program
        output_types = [nodes.node_type(item) for item in program.output.all_input_nodes]
        results = list(program.output.all_input_nodes)
        for node in self.edit.nodes():
            wanted = self._dtype_for(node)
            mask = nodes.argument(node, _MASKS[node.target]) if node.target in _MASKS and wanted is self.low else None
            swaps: dict[fx.Node, fx.Node] = {}
            for item in node.all_input_nodes:
                if wanted is not None and _is_floating(item) and nodes.tensor_type(item).dtype in (torch.float32, self.low):
                    swaps[item] = self._cast(item, wanted, node, clamp=item is mask)
            self._apply(node, {old: new for old, new in swaps.items() if old is not new})
        for item, before in zip(results, output_types, strict=True):
            if nodes.is_tensor(item) and nodes.tensor_type(item).dtype == self.low and before != nodes.node_type(item):
                back = self._cast(item, torch.float32, program.output)
                program.output.replace_input_with(item, back)

    def _dtype_for(self, node: fx.Node) -> torch.dtype | None:
        """The floating type a node's operands shall have; None to leave them as they are."""
        if node.target in _LOW:
            return self.low
        if not any(_is_floating(item) and nodes.tensor_type(item).dtype == self.low for item in node.all_input_nodes):
            return None
        return self.low if node.target in _FOLLOWS or is_view(node) else torch.float32

    def _cast(self, item: fx.Node, dtype: torch.dtype, reader: fx.Node, *, clamp: bool = False) -> fx.Node:
        """The value in that dtype, cast where it is first needed; a weight is cast once and for all."""
        found = nodes.tensor_type(item)
        if found.dtype == dtype or found.rank == 0:
            return item
        if item.op == "get_attr" and dtype == self.low and item.target not in self.edit.program.state:
            return self._cast_weight(item, reader)
        key = (item, dtype)
        if key not in self.casts:
            with self.edit.before(reader):
                value = self.edit.call(aten.clamp_min.default, item, torch.finfo(dtype).min) if clamp else item
                self.casts[key] = self.edit.call(aten.to.dtype, value, dtype)
        return self.casts[key]

    def _cast_weight(self, item: fx.Node, reader: fx.Node) -> fx.Node:
        key = (item, self.low)
        if key not in self.casts:
            weight = self.edit.program.weight(str(item.target))
            with self.edit.before(reader):
                low = weight.detach().to(self.low)
                tensor = nn.Parameter(low, requires_grad=weight.requires_grad) if isinstance(weight, nn.Parameter) else low
                self.casts[key] = self.edit.weight(f"{item.target}_low", tensor)
        return self.casts[key]

    def _apply(self, node: fx.Node, swaps: dict[fx.Node, fx.Node]) -> None:
        """Let the node read the cast values, and type it anew where what it reads has changed."""
        if not swaps and self.changed.isdisjoint(node.all_input_nodes):
            return
        for old, new in swaps.items():
            node.replace_input_with(old, new)
        before = nodes.node_type(node)
        self.edit.retype_call(node)
        if swaps:
            self.edit.rewritten += 1
        if nodes.node_type(node) != before:
            self.changed.add(node)


def _is_floating(item: fx.Node) -> bool:
    return nodes.is_tensor(item) and nodes.tensor_type(item).dtype.is_floating_point
