"""Remove feed-forward neurons that contribute nothing.

A neuron is dead when its column of the down projection is zero, or when its activation is: a row of zeros in the gate, or in
the up projection, without a bias. Its rows of up and gate, its column of down, and its elements in between are removed.

    W₂ f(W₁ x) = Σ W₂[:, i] f(W₁[i] x)                          the sum over neurons: a term with W₂[:, i] = 0 is removed

Li et al. 2017, "Pruning Filters for Efficient ConvNets", §3.1, for the removal of both sides of a unit.
Inputs are taken to be finite.
"""

from __future__ import annotations

import torch
from torch import fx

from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.columns import Columns, feature_dim, find_neuron_columns
from lissom.compiler.analysis.axes.dead_units import dead_units
from lissom.compiler.analysis.axes.zeros import zero_at, zeros
from lissom.compiler.analysis.structure.linear import input_of
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir.editor import Editor
from lissom.compiler.transforms.removal.elimination import eliminate, obstacle, replace_dead


def eliminate_neurons(edit: Editor) -> None:
    """Remove feed-forward neurons that contribute nothing, and feed-forwards without a neuron that does."""
    dead_sites = _dead_sites(edit, report=True)
    replace_dead(edit, [columns for columns in dead_sites if bool(_dead_neurons(edit, columns).all())], "neurons")
    chosen: dict[Axis, fx.Node] = {}
    for columns in _dead_sites(edit):
        if reason := _obstacle(edit, columns):
            edit.skip(columns.layer, f"dead neurons stay: {reason}")
        else:
            chosen |= dict.fromkeys(columns.axes, columns.layer)
    eliminate(edit, [(layer, (atom,)) for atom, layer in chosen.items()], "neurons")


def _dead_sites(edit: Editor, *, report: bool = False) -> list[Columns]:
    """The down projections of feed-forwards with dead neurons.

    Args:
        report: whether to report those without a neuron axis.
    """
    sites: list[Columns] = []
    for site in edit.program.fact(structure).feed_forward:
        columns = find_neuron_columns(edit.program, site)
        if isinstance(columns, str):
            if report:
                edit.skip(site.down, columns)
        elif bool(_dead_neurons(edit, columns).any()):
            sites.append(columns)
    return sites


def _dead_neurons(edit: Editor, columns: Columns) -> torch.Tensor:
    """The neurons whose column or whose activation is zero, [neurons]."""
    dead = columns.dead(edit.tensor(columns.weight))
    values = zero_at(edit.program.fact(zeros), input_of(columns.layer), feature_dim(columns.layer))
    return dead | values if len(values) == len(dead) else dead


def _obstacle(edit: Editor, columns: Columns) -> str | None:
    """The reason the dead neurons of a site cannot be removed; None if they can."""
    if reason := obstacle(edit, columns.axes):
        return reason
    gone = [bool(dead_units(edit.program, (atom,)).any()) for atom in columns.axes]
    return None if any(gone) else "another layer reads the same neurons and needs them"
