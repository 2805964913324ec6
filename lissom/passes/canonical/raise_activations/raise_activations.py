"""Raise activations written as separate operators to one operator: GELU (exact and tanh), SiLU, Mish.

    gelu(x)      = x/2 · (1 + erf(x/√2))                                Hendrycks & Gimpel 2016
    gelu_tanh(x) = x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))         the same, eq. 2
    silu(x)      = x · sigmoid(x)                                       Elfwing et al. 2017
    mish(x)      = x · tanh(softplus(x))                                Misra 2019

An activation is recognized by its values on a grid, not by its operators, so every order of the factors and every rounding of
the constants is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.passes.canonical.raise_activations.by_value import Function, find_function

aten = torch.ops.aten

_KNOWN: dict[object, list[tuple[torch._ops.OpOverload, dict[str, object], Function]]] = {
    aten.erf.default: [(aten.gelu.default, {}, functional.gelu)],
    aten.tanh.default: [
        (aten.gelu.default, {"approximate": "tanh"}, partial(functional.gelu, approximate="tanh")),
        (aten.mish.default, {}, functional.mish),
    ],
    aten.sigmoid.default: [(aten.silu.default, {}, functional.silu)],
    aten.exp.default: [(aten.silu.default, {}, functional.silu)],
}


@dataclass(frozen=True)
class RaiseActivations(Rewrite):
    """Replaces GELU, SiLU and Mish written as separate operators by one operator."""

    def run(self, edit: Editor) -> None:
        for core in edit.nodes(*_KNOWN):
            if not nodes.tensor_type(core).dtype.is_floating_point:
                continue
            for target, options, reference in _KNOWN[core.target]:
                if (expression := find_function(core, reference)) is not None:
                    root, argument = expression
                    with edit.before(root, like=[core, root]):
                        raised = edit.call(target, argument, **options)
                    edit.replace(root, raised)
                    break
