"""Values of attentions, and the output projections that read them, in another basis."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lissom.compiler.analysis.axes.axes import axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir.calls import Attention
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.types import fixed
from lissom.passes.quantize.rotate.channels import rotation_obstacle, turn


def rotate_values(edit: Editor, basis_of: Callable[[int], torch.Tensor]) -> None:
    """Rotate the values of every attention, and what reads its output; attentions that do not allow it are reported.

    Args:
        basis_of: an orthogonal matrix of a size, in float64.
    """
    known = edit.program.fact(axes)
    chosen: dict[Axis, torch.Tensor] = {}
    for site in edit.program.fact(structure).attention:
        axis = known.axis(Attention(site.node).v, -1)
        if axis not in chosen and edit.may_change(site.node, rotation_obstacle(edit.program, axis)):
            chosen[axis] = basis_of(fixed(axis.size))
    turn(edit, chosen)
