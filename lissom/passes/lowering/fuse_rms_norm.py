"""Lower RMS norms on a CPU to the kernel `lissom::fused_rms_norm`, one pass where PyTorch runs five operators.

rms_norm(x, [features], weight, eps)   ->  lissom::fused_rms_norm(x, weight, eps)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.ops.fused_rows import fused_rms_norm
from lissom.ops.native import missing_kernel

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseRmsNorm(Rewrite):
    """Lowers RMS norms over the last dimension to the CPU kernel `lissom::fused_rms_norm`."""

    def run(self, edit: Editor) -> None:
        for node in edit.treatable(_obstacle, aten.rms_norm.default):
            x, weight, eps = node.args[0], nodes.argument(node, "weight"), nodes.argument(node, "eps")
            if eps is None:
                eps = torch.finfo(nodes.tensor_type(x).dtype).eps
            edit.replace_by(node, fused_rms_norm, x, *([weight] if weight is not None else ()), eps=eps)


def _obstacle(norm: fx.Node) -> str | None:
    """Why a norm cannot be lowered; None when it can."""
    x, weight = nodes.tensor_type(norm.args[0]), nodes.argument(norm, "weight")
    if nodes.argument(norm, "normalized_shape") != [x.shape[-1]]:
        return "it norms more than the last dimension"
    if weight is not None and nodes.tensor_type(weight).dtype != x.dtype:
        return "its weight has another dtype"
    return missing_kernel(x.dtype, x.device)
