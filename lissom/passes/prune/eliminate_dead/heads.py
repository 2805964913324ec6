"""Remove attention heads that contribute nothing.

A head is dead when all its columns of the output projection are zero, or its values are. Its rows are removed from the query,
key and value projections, its columns from the output projection, and constant sizes are updated. A key/value head is removed
when all query heads of its group are dead. From the remaining groups the same number of dead query heads is removed each.

    softmax(Q Kᵀ) V Wₒ = Σ softmax(Qₕ Kₕᵀ) Vₕ Wₒ[h]             the sum over heads: a term with Wₒ[h] = 0 is removed

Michel, Levy, Neubig 2019, "Are Sixteen Heads Really Better than One?", §2.2 masks heads; this removes them.
Inputs are taken to be finite.
"""

from __future__ import annotations

import torch
from torch import fx

from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.columns import Columns, find_head_columns
from lissom.compiler.analysis.axes.dead_units import dead_units
from lissom.compiler.analysis.axes.zeros import zero_at, zeros
from lissom.compiler.analysis.structure.attention import AttentionSite
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.transforms.removal.elimination import eliminate, obstacle, replace_dead
from lissom.passes.prune.eliminate_dead.head_selection import MASK, QUERY_AND_KEY, VALUE, drop_selections, select_heads


def eliminate_heads(edit: Editor) -> None:
    """Remove attention heads that contribute nothing, and attentions without a head that does."""
    dead_sites = _dead_sites(edit, report=True)
    replace_dead(edit, [columns for site, columns in dead_sites if bool(_dead_heads(edit, site, columns).all())], "heads")
    made: list[fx.Node] = []
    # A selection keeps its input as it is, which may hinder removal in another attention: so masks are checked twice.
    for arguments in (MASK, MASK, QUERY_AND_KEY, QUERY_AND_KEY, VALUE):
        for site in [site for site, columns in _dead_sites(edit) if _obstacle(edit, site, columns)]:
            made += select_heads(edit, site.node, arguments)
    chosen: list[tuple[fx.Node, tuple[Axis, ...]]] = []
    for site, columns in _dead_sites(edit):
        if reason := _obstacle(edit, site, columns):
            edit.skip(site.node, f"dead heads stay: {reason}")
        else:
            chosen.append((site.node, columns.axes))
    eliminate(edit, chosen, "heads")
    drop_selections(edit, made)


def _dead_sites(edit: Editor, *, report: bool = False) -> list[tuple[AttentionSite, Columns]]:
    """The attentions with dead heads.

    Args:
        report: whether to report attentions without a head axis.
    """
    sites: list[tuple[AttentionSite, Columns]] = []
    for site in edit.program.fact(structure).attention:
        columns = find_head_columns(edit.program, site)
        if isinstance(columns, str):
            if report:
                edit.skip(site.node, columns)
        elif bool(_dead_heads(edit, site, columns).any()):
            sites.append((site, columns))
    return sites


def _dead_heads(edit: Editor, site: AttentionSite, columns: Columns) -> torch.Tensor:
    """The heads whose columns or whose values are all zero, booleans [heads]."""
    dead = columns.dead(edit.tensor(columns.weight))
    if nodes.tensor_type(site.node).shape[-3] == columns.count:
        dead |= zero_at(edit.program.fact(zeros), site.node, -3)
    return dead


def _obstacle(edit: Editor, site: AttentionSite, columns: Columns) -> str | None:
    """The reason the dead heads of a site cannot be removed; None if they can."""
    if reason := obstacle(edit, columns.axes):
        return reason
    missed = _dead_heads(edit, site, columns) & ~dead_units(edit.program, columns.axes).flatten()
    return "another operator on the same axis needs them" if bool(missed.any()) else None
