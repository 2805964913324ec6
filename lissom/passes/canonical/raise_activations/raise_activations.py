"""Raise activations written as separate operators to one operator: GELU (exact and tanh), SiLU, Mish, squared ReLU.

    gelu(x)         = x/2 · (1 + erf(x/√2))                             Hendrycks & Gimpel 2016
    gelu_tanh(x)    = x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))      the same, eq. 2
    silu(x)         = x · sigmoid(x)                                    Elfwing et al. 2017
    mish(x)         = x · tanh(softplus(x))                             Misra 2019
    squared_relu(x) = max(x, 0)²                                        So et al. 2021 (Primer)

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
from lissom.ops.squared_relu import squared_relu, squared_relu_reference
from lissom.passes.canonical.raise_activations.by_value import Function, find_function

aten = torch.ops.aten

_Raised = tuple[torch._ops.OpOverload, dict[str, object], Function]
_SQUARE: list[_Raised] = [(squared_relu, {}, squared_relu_reference)]
_KNOWN: dict[object, list[_Raised]] = {
    aten.erf.default: [(aten.gelu.default, {}, functional.gelu)],
    aten.tanh.default: [
        (aten.gelu.default, {"approximate": "tanh"}, partial(functional.gelu, approximate="tanh")),
        (aten.mish.default, {}, functional.mish),
    ],
    aten.sigmoid.default: [(aten.silu.default, {}, functional.silu)],
    aten.exp.default: [(aten.silu.default, {}, functional.silu)],
    aten.relu.default: _SQUARE,
    aten.clamp.default: _SQUARE,
    aten.clamp_min.default: _SQUARE,
}


@dataclass(frozen=True)
class RaiseActivations(Rewrite):
    """Replaces GELU, SiLU, Mish and squared ReLU written as separate operators by one operator."""

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
