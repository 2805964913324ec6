"""Fold redundant casts: round trips, casts of casts, and casts of weights.

cast_C(cast_B(x)) = cast_C(x) where B represents every value of A, the dtype of x, and = x where C is A. A cast that rounds is
kept: float32 → bfloat16 → float32 is not the identity. A weight whose readers all cast it to a smaller dtype is stored in that
dtype. A cast also stays where the program relies on it being a copy: of state, of a tensor that would otherwise be returned to
the caller itself, or of a memory layout that is read as such.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.casts import cast_from, dtype_of, holds, rests_on_copy
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import CASTS
from lissom.compiler.ir.types import short_dtype
from lissom.compiler.pipeline.pass_kinds import Rewrite

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldCasts(Rewrite):
    """Removes pairs of casts that cancel without loss, and casts weights at compile time."""

    def run(self, edit: Editor) -> None:
        kept: dict[str, fx.Node] = {}
        for node in edit.nodes(*CASTS):
            source = cast_from(node)
            if source is None:
                continue
            # The value before its lossless casts.
            origin = source
            while (before := cast_from(origin)) is not None and holds(dtype_of(origin), dtype_of(before)):
                origin = before
            if dtype_of(origin) == dtype_of(node):
                if edit.may_change(node, rests_on_copy(edit.program, node, origin)):
                    edit.replace(node, origin)
            elif origin is not source:
                edit.replace_by(node, aten.to.dtype, origin, dtype_of(node))
            elif source.op == "get_attr":
                _fold_weight(edit, node, source, kept)


def _fold_weight(edit: Editor, node: fx.Node, weight: fx.Node, kept: dict[str, fx.Node]) -> None:
    """Let readers of a cast weight read one stored in that dtype.

    Args:
        kept: the weights made so far, by name.
    """
    dtype = dtype_of(node)
    if not edit.may_change(node, rests_on_copy(edit.program, node, weight) or _obstacle(node, weight)):
        return
    name = f"{weight.target}_{short_dtype(dtype)}"
    if name not in kept:
        # Before the weight, so that casts in any order find it.
        with edit.before(weight, like=[node]):
            kept[name] = edit.weight(name, edit.like(weight, edit.tensor(weight).to(dtype)))
    edit.replace(node, kept[name])


def _obstacle(node: fx.Node, weight: fx.Node) -> str | None:
    """The reason a weight cannot be stored in the dtype of its cast; None if it can."""
    if dtype_of(node).itemsize > dtype_of(weight).itemsize:
        return "the weight would take more bytes"
    others = [user for user in weight.users if cast_from(user) is None or dtype_of(user) != dtype_of(node)]
    if others:
        return "the weight is read in its own dtype too, and would be held twice"
    return None
