"""Lower rotary position embedding on a CPU to the kernel `lissom::fused_rotary`: one pass, without a rotated copy.

lissom::rotary(x, cos, sin)   ->  lissom::fused_rotary(x, cos, sin)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Rotary
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.ops.fused_rows import fused_rotary
from lissom.ops.native import missing_kernel
from lissom.ops.rotary import rotary


@dataclass(frozen=True)
class FuseRotary(Rewrite):
    """Lowers rotary embeddings of [batch, heads, tokens, head_dim] to the CPU kernel."""

    def run(self, edit: Editor) -> None:
        for node in edit.treatable(_obstacle, rotary):
            edit.replace_by(node, fused_rotary, *node.args, **node.kwargs)


def _obstacle(node: fx.Node) -> str | None:
    """The reason a rotation cannot be lowered; None if it can."""
    call = Rotary(node)
    x, *tables = (nodes.tensor_type(operand) for operand in (call.x, call.cos, call.sin))
    if x.rank != 4:
        return "its operand is not [batch, heads, tokens, head_dim]"
    if any(table.dtype != x.dtype for table in tables):
        return "its angles have another dtype"
    if any(table.rank > 4 for table in tables):
        return "its angles have more dimensions than its operand"
    return missing_kernel(x.dtype, x.device)
