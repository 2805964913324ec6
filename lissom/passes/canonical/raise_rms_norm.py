"""Raise root-mean-square normalization written as separate operators to `rms_norm`.

    rms_norm(x) = x / √(mean(x²) + ε) · w            Zhang & Sennrich 2019, eq. 4

Found in any of the usual spellings: the square as `pow`, `square` or `x·x`; the root as `rsqrt`, `1/sqrt`, `pow(-0.5)` or a
division; the weight before or after a cast back from float32, as `w` or as Gemma's `1 + w`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.formula import Formula
from lissom.compiler.ir.match import only_user, other_argument, strip_casts
from lissom.compiler.ir.operators import CASTS
from lissom.compiler.pipeline.pass_kinds import Rewrite

aten = torch.ops.aten

_SQUARES = "mean(x ** 2 | square(x) | x * x, [-1], True, ...)"
_MEAN = Formula(_SQUARES)
_NORM = Formula(
    f"""
    mean = {_SQUARES}
    root = sqrt(mean + eps) | (mean + eps) ** 0.5
    x / root | x * (rsqrt(mean + eps) | (mean + eps) ** -0.5 | reciprocal(root))
    """,
    eps=float,
)


@dataclass(frozen=True)
class RaiseRmsNorm(Rewrite):
    """Replaces RMS norms written as separate operators by `rms_norm`."""

    def run(self, edit: Editor) -> None:
        seen = set[fx.Node]()
        for division in edit.matches(_NORM):
            seen.add(division["mean"])
            if nodes.tensor_type(division.root) != nodes.tensor_type(division["x"]):
                edit.skip(division["mean"], "what is divided has another dtype than what was squared")
            else:
                _raise(edit, division["x"], division.root, division.number("eps"))
        for division in edit.matches(_MEAN):
            if division.root not in seen:
                edit.skip(division.root, "a mean of squares that does not divide what was squared")


def _raise(edit: Editor, x: fx.Node, normalised: fx.Node, epsilon: float) -> None:
    """Replace the normalized value, and a cast and a weight after it where there are any, by `rms_norm`."""
    cast, original = only_user(normalised), strip_casts(x)
    end, start = normalised, x
    if nodes.is_call(cast, *CASTS) and nodes.tensor_type(cast) == nodes.tensor_type(original):
        end, start = cast, original
    root, weight = _weighted(end)
    if weight is not None and nodes.tensor_type(weight).dtype != nodes.tensor_type(end).dtype:
        root, start, weight = normalised, x, None
    with edit.before(root, like=[normalised]):
        raised = edit.call(aten.rms_norm.default, start, [edit.size(x, -1)], weight, epsilon)
    edit.replace(root, raised)


def _weighted(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The product of the node with a weight over its last dimension, and the weight; the node alone when there is none."""
    product = only_user(node)
    if nodes.is_call(product, aten.mul.Tensor):
        other = other_argument(product, node)
        if nodes.is_tensor(other) and nodes.tensor_type(other).shape == nodes.tensor_type(node).shape[-1:]:
            return product, other
    return node, None
