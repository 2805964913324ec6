"""Raise softmax written as separate operators to one operator.

    softmax(x) = exp(x − c) / Σ exp(x − c)        c the same along the dimension; c = max x keeps exp from overflowing

The subtraction of the maximum is optional. Without it the separate operators overflow where `softmax` does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.formula import Formula
from lissom.compiler.pipeline.pass_kinds import Rewrite

aten = torch.ops.aten

_SOFTMAX = Formula(
    """
    shifted = x - (amax(x, [dim], True) | max(x, dim, True)[0])
    powers = exp(shifted | x)
    total = sum(powers, [dim], True)
    powers / total
    """,
    dim=int,
)


@dataclass(frozen=True)
class RaiseSoftmax(Rewrite):
    """Replaces softmax written as separate operators by `softmax`."""

    def run(self, edit: Editor) -> None:
        for match in edit.matches(_SOFTMAX):
            with edit.before(match.root, like=[match["powers"], match["total"], match.root]):
                raised = edit.call(aten.softmax.int, match["x"], int(match.number("dim")))
            edit.replace(match.root, raised)
