"""Remove attention heads that contribute nothing.

A head is dead when every column of the output projection that reads it is zero, or its values are. Its rows go from the query,
key and value projections, its columns from the output projection, and every size follows. Key/value heads that several query
heads share go with the last of their group; of what is left, as many query heads go from each group as every group can spare.

    softmax(Q Kᵀ) V Wₒ = Σ softmax(Qₕ Kₕᵀ) Vₕ Wₒ[h]             the sum over heads: a term with Wₒ[h] = 0 can go

Michel, Levy, Neubig 2019, "Are Sixteen Heads Really Better than One?", §2.2 masks heads; this removes them.
Inputs are taken to be finite.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.compiler.transforms.removal.elimination import eliminate, obstacle, replace_by_constant
from lissom.passes.prune.eliminate_dead_heads.head_selection import MASK, QUERY_AND_KEY, VALUE, drop_selections, select_heads


@dataclass(frozen=True)
class EliminateDeadHeads(Rewrite):
    """Removes attention heads that contribute nothing, and attentions that have no other head."""

    def run(self, edit: Editor) -> None:
        found = _dead_sites(edit, report=True)
        for columns in [item for site, item in found if item.alone and bool(_dead_heads(edit, site, item).all())]:
            if reason := replace_by_constant(edit, columns.layer):
                edit.skip(columns.layer, f"all heads it reads are dead, but {reason}")
        made: list[fx.Node] = []
        # A choice keeps what it chooses from as it is, which may stand against another attention: so masks are looked at twice.
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
    """The attentions with heads that contribute nothing; report: whether to note those whose heads are not told apart."""
    found: list[tuple[AttentionSite, Columns]] = []
    program = edit.program
    for site in program.fact(structure).attention:
        columns = find_head_columns(program, site)
        if isinstance(columns, str):
            if report:
                edit.skip(site.node, columns)
        elif bool(_dead_heads(edit, site, columns).any()):
            found.append((site, columns))
    return found


def _dead_heads(edit: Editor, site: AttentionSite, columns: Columns) -> torch.Tensor:
    """The heads without a column that is not zero, or without a value that is not, [heads]."""
    program = edit.program
    dead = columns.dead(program.weight(str(columns.weight.target)))
    if nodes.tensor_type(site.node).shape[-3] == columns.count:
        dead |= zero_at(program.fact(zeros), site.node, nodes.tensor_type(site.node).rank - 3)
    return dead


def _obstacle(edit: Editor, site: AttentionSite, columns: Columns) -> str:
    """Why the dead heads of a site cannot go; empty when they can."""
    reason = obstacle(edit, columns.axes)
    if reason:
        return reason
    missed = _dead_heads(edit, site, columns) & ~dead_units(edit.program, columns.axes).flatten()
    return "what they share an axis with needs them" if bool(missed.any()) else ""
