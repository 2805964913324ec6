"""Remove experts that no token can be routed to.

    topk(masked_fill(x Wᵀ, dropped, -inf))      dropped experts are never chosen while top_k others are left

Rows of the router and matrices of the experts are removed. Inputs are taken to be finite.
"""

from __future__ import annotations

from lissom.compiler.analysis.structure.routed_experts import RoutedExperts, dropped_experts, routed_experts
from lissom.compiler.ir.editor import Editor
from lissom.compiler.transforms.experts import removable_experts, remove_experts


def eliminate_experts(edit: Editor) -> None:
    """Remove the experts that `prune-experts` kept from being chosen."""
    removed = edit.rewritten
    for router, site in edit.program.fact(routed_experts):
        if not isinstance(site, RoutedExperts) or not bool(dropped_experts(edit.program, site).any()):
            continue
        dropped = removable_experts(edit, site)
        if isinstance(dropped, str):
            edit.skip(router, dropped)
        else:
            remove_experts(edit, site, dropped)
    if edit.rewritten > removed:
        edit.retype()
