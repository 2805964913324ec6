"""Lower layer norms and RMS norms on a CPU to kernels that read each row once from memory.

    layer_norm(x, [features], weight, bias, eps)   ->  lissom::fused_layer_norm(x, weight, bias, eps)
    rms_norm(x, [features], weight, eps)           ->  lissom::fused_rms_norm(x, weight, eps)

PyTorch runs an RMS norm as five operators, and a layer norm of bfloat16 in twice the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Norm
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import LAYER_NORMS
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.ops.fused_rows import fused_layer_norm, fused_rms_norm
from lissom.ops.native import missing_kernel

aten = torch.ops.aten

_FUSED: dict[object, torch._ops.OpOverload] = dict(zip(LAYER_NORMS, (fused_layer_norm, fused_rms_norm), strict=True))


@dataclass(frozen=True)
class FuseNorm(Rewrite):
    """Lowers layer norms and RMS norms over the last dimension to the CPU kernels."""

    def run(self, edit: Editor) -> None:
        for node in edit.treatable(_obstacle, *_FUSED):
            eps = nodes.argument(node, "eps")
            if eps is None:
                eps = torch.finfo(nodes.tensor_type(node).dtype).eps
            edit.replace_by(node, _FUSED[node.target], Norm(node).x, *_parameters(node), eps=eps)


def _parameters(norm: fx.Node) -> list[object]:
    """The weight of a norm, and the bias of a layer norm; None for one that it lacks."""
    names = ("weight", "bias") if norm.target is aten.layer_norm.default else ("weight",)
    return [nodes.argument(norm, name) for name in names]


def _obstacle(norm: fx.Node) -> str | None:
    """The reason a norm cannot be lowered; None if it can."""
    x = nodes.tensor_type(Norm(norm).x)
    if Norm(norm).shape != [x.shape[-1]]:
        return "it norms more than the last dimension"
    if any(nodes.tensor_type(parameter).dtype != x.dtype for parameter in _parameters(norm) if parameter is not None):
        return "its weight or its bias has another dtype"
    return missing_kernel(x.dtype, x.device)
