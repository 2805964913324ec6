"""Removal of experts from a mixture: masks keep them from being chosen, then their weights are removed.

    masked      ids = topk(masked_fill(f(masked_fill(x Wᵀ, dropped, -inf)), dropped, -inf))
    removed     ids = topk(f(x W[kept]ᵀ)), products with W₁[kept] and W₂[kept]

The second mask is there for scores with a correction bias only. The first step changes the numbers, the second only the form: a
softmax over the scores gives an expert with -inf the weight 0, and a sigmoid does so too.
"""

from __future__ import annotations

import math

import torch

from lissom.compiler.analysis.structure.routed_experts import RoutedExperts, dropped_experts
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import MaskedFill
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import SIZES_AT
from lissom.compiler.ir.view_calls import Sized

aten = torch.ops.aten


def mask_experts(edit: Editor, site: RoutedExperts, dropped: torch.Tensor) -> None:
    """Set the scores of these experts to -inf.

    Args:
        dropped: booleans [experts].
    """
    for value in site.masked:
        with edit.before(value.next, like=[value]):
            mask = edit.weight(f"{value.name}.dropped_experts", dropped.to(nodes.tensor_type(value).device))
            masked = edit.call(aten.masked_fill.Scalar, value, mask, -math.inf)
        value.replace_all_uses_with(masked, delete_user_cb=lambda user, own=masked: user is not own)
    edit.rewritten += int(dropped.sum())
    edit.program.edits += 1


def remove_experts(edit: Editor, site: RoutedExperts, dropped: torch.Tensor) -> None:
    """Remove experts that masks keep from being chosen: their masks, and their entries of every weight.

    Types of calls are those from before until `edit.retype`.

    Args:
        dropped: booleans [experts], as many in every group.
    """
    kept = (~dropped).nonzero().flatten()
    for masked in site.masks:
        mask = MaskedFill(masked).mask
        if not bool(edit.tensor(mask).cpu()[..., kept].any()):
            edit.replace(masked, MaskedFill(masked).x)
            edit.rewritten -= 1
    for weight, dim in site.stacks.items():
        tensor = edit.tensor(weight)
        edit.set_weight(weight, tensor.index_select(dim, kept.to(tensor.device)), retype=False)
    for call in site.sizes:
        at = SIZES_AT[call.target]
        sizes = Sized(call).sizes
        if sizes[-1] != -1:
            nodes.set_operand(call, at, [*sizes[:-1], len(kept) if sizes[-1] == site.experts else len(kept) // site.groups])
    for call in site.counts:
        nodes.set_arguments(call, nodes.operand(call), len(kept), 0, len(kept) - 1)
    edit.rewritten += int(dropped.sum())


def removable_experts(edit: Editor, site: RoutedExperts) -> torch.Tensor | str:
    """The experts that masks keep from being chosen, booleans [experts], or why they cannot be removed."""
    dropped = dropped_experts(edit.program, site)
    left = (~dropped).view(site.groups, -1).sum(1)
    if len(left.unique()) > 1:
        return f"dropped experts stay: its {site.groups} groups have {', '.join(map(str, left.tolist()))} experts left"
    if int(left[0]) < site.least:
        return f"dropped experts stay: its router chooses among at least {site.least * site.groups}"
    return dropped
