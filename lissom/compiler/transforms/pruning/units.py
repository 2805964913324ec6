"""The sites whose units can be pruned, heads of an attention or neurons of a feed-forward, and the weights that hold them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.columns import Columns, find_head_columns, find_neuron_columns
from lissom.compiler.analysis.module_filter import is_path_protected
from lissom.compiler.analysis.structure.attention import AttentionSite
from lissom.compiler.analysis.structure.linear import input_of
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program


@dataclass(frozen=True)
class UnitSite:
    """Units that go one by one, told from the columns of the weight that reads them.

    path: of the module the site belongs to. columns: of the layer that reads the units.
    units: [units, features], for each unit the indices it has along the columns' dimension.
    layers: the linear layers that multiply with that weight; more than one where layers share it.
    """

    path: str
    columns: Columns
    units: torch.Tensor
    layers: tuple[fx.Node, ...]

    @property
    def count(self) -> int:
        return len(self.units)

    def matrix(self, program: Program) -> torch.Tensor:
        """The weight as [out_features, in_features] in float32."""
        return self.columns.read(program)

    def by_unit(self, values: torch.Tensor) -> torch.Tensor:
        """A number for every column, [in_features], summed over each unit, [units]."""
        return values[self.units.to(values.device)].sum(1)

    def is_protected(self, patterns: str) -> bool:
        """True when the path matches one of the patterns, which blanks or commas divide; a module covers what it holds."""
        return is_path_protected(self.path, patterns)

    def data_obstacle(self, program: Program) -> str:
        """Why nothing can be learnt from what its layer reads; empty when it can."""
        features = nodes.tensor_type(input_of(self.columns.layer)).shape[-1]
        if features != program.weight(str(self.columns.weight.target)).shape[self.columns.dim]:
            return "its layer does not read one feature a column"
        return ""


def head_sites(edit: Editor) -> list[UnitSite]:
    """Every attention whose heads can be told apart. With grouped queries a unit is a key/value head and all that read it."""
    found: list[tuple[str, Columns, torch.Tensor]] = []
    for site in edit.program.fact(structure).attention:
        columns = find_head_columns(edit.program, site)
        if isinstance(columns, str):
            edit.skip(site.node, columns)
        else:
            found.append((site.path, columns, _head_groups(site, columns.axes)))
    return _merged(found)


def neuron_sites(edit: Editor) -> list[UnitSite]:
    """Every feed-forward whose neurons can be told apart."""
    found: list[tuple[str, Columns, torch.Tensor]] = []
    for site in edit.program.fact(structure).feed_forward:
        columns = find_neuron_columns(edit.program, site)
        if isinstance(columns, str):
            edit.skip(site.down, columns)
        else:
            found.append((site.path, columns, torch.arange(columns.count)[:, None]))
    return _merged(found)


def _head_groups(site: AttentionSite, axes: tuple[Axis, ...]) -> torch.Tensor:
    """The heads that go together, [units, heads]: one by one, or with grouped queries those of one key/value head."""
    heads, groups = torch.arange(site.heads), site.key_value_heads
    if groups in (1, site.heads):
        return heads[:, None]
    repeated = len(axes) == 2 and axes[0].find().size != groups and axes[1].find().size == groups
    return heads.view(-1, groups).T if repeated else heads.view(groups, -1)


def _merged(found: list[tuple[str, Columns, torch.Tensor]]) -> list[UnitSite]:
    """The sites, those that share a weight as one."""
    sites: dict[str, UnitSite] = {}
    for path, columns, groups in found:
        name = str(columns.weight.target)
        if name in sites:
            first = sites[name]
            sites[name] = UnitSite(first.path, first.columns, first.units, (*first.layers, columns.layer))
            continue
        units = torch.stack([columns.indices(group.tolist()) for group in groups])
        sites[name] = UnitSite(path, columns, units, (columns.layer,))
    return list(sites.values())
