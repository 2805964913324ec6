"""The sites whose units can be pruned, heads of an attention or neurons of a feed-forward, and the weights that read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from lissom.compiler.analysis.amounts import AmountSite, site_names
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.columns import Columns, find_head_columns, find_neuron_columns
from lissom.compiler.analysis.structure.attention import AttentionSite
from lissom.compiler.analysis.structure.linear import input_of
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program


@dataclass(frozen=True)
class UnitSite:
    """Units that can be removed one by one, with the columns of the weight that reads them.

    Attributes:
        paths: of the modules whose units these are; several where layers share a weight.
        columns: of the layer that reads the units.
        units: [units, features], the indices of each unit along the columns' dimension.
        layers: the linear layers that use that weight; more than one when layers share it.
    """

    paths: tuple[str, ...]
    columns: Columns
    units: torch.Tensor
    layers: tuple[fx.Node, ...]

    @property
    def path(self) -> str:
        return self.paths[0]

    @property
    def count(self) -> int:
        return len(self.units)

    def matrix(self, program: Program) -> torch.Tensor:
        """The weight as [out_features, in_features] in float32."""
        return self.columns.read_matrix(program)

    def by_unit(self, values: torch.Tensor) -> torch.Tensor:
        """A number for every column, [in_features], summed over each unit, [units]."""
        return values[self.units.to(values.device)].sum(1)

    def is_readable(self, program: Program) -> bool:
        """True when the site can be calibrated on its layer's inputs: the layer reads one feature per column."""
        features = nodes.tensor_type(input_of(self.columns.layer)).shape[-1]
        return features == program.weight(str(self.columns.weight.target)).shape[self.columns.dim]


def head_sites(edit: Editor) -> list[UnitSite]:
    """The attentions whose heads have columns. With grouped queries a unit is a key/value head with its query heads."""
    sites = {site.node: site for site in edit.program.fact(structure).attention}
    accepted = edit.accepted((node, find_head_columns(edit.program, site)) for node, site in sites.items())
    return _merged((sites[node].path, columns, _head_groups(sites[node], columns.axes)) for node, columns in accepted.items())


def neuron_sites(edit: Editor) -> list[UnitSite]:
    """The feed-forwards whose neurons have columns; the others are reported."""
    sites = {site.down: site for site in edit.program.fact(structure).feed_forward}
    accepted = edit.accepted((node, find_neuron_columns(edit.program, site)) for node, site in sites.items())
    return _merged((sites[node].path, columns, torch.arange(columns.count)[:, None]) for node, columns in accepted.items())


def _head_groups(site: AttentionSite, axes: tuple[Axis, ...]) -> torch.Tensor:
    """The heads of each unit, [units, heads]: single heads, or with grouped queries those of one key/value head."""
    heads, groups = torch.arange(site.heads), site.key_value_heads
    if groups in (1, site.heads):
        return heads[:, None]
    repeated = len(axes) == 2 and axes[0].find().size != groups and axes[1].find().size == groups
    return heads.view(-1, groups).T if repeated else heads.view(groups, -1)


def _merged(candidates: Iterable[tuple[str, Columns, torch.Tensor]]) -> list[UnitSite]:
    """The sites, with those that share a weight merged into one."""
    sites: dict[str, UnitSite] = {}
    for path, columns, groups in candidates:
        name = str(columns.weight.target)
        if name in sites:
            known = sites[name]
            paths = tuple(dict.fromkeys((*known.paths, path)))
            sites[name] = replace(known, paths=paths, layers=(*known.layers, columns.layer))
        else:
            units = torch.stack([columns.indices(group.tolist()) for group in groups])
            sites[name] = UnitSite((path,), columns, units, (columns.layer,))
    names = site_names([site.path for site in sites.values()], list(sites))
    return [replace(site, paths=(name, *site.paths[1:])) for site, name in zip(sites.values(), names, strict=True)]


def amount_sites(sites: Sequence[UnitSite], kind: str, takes: str, shared: bool) -> list[AmountSite]:
    """The sites as a pass takes amounts for them, from one unit to all.

    Args:
        takes: the pass's text.
        shared: whether sites on one axis must get the same amount, as a unit is removed from all of them or from none.
    """
    amounts: list[AmountSite] = []
    for site in sites:
        others = [other for other in sites if shared and other is not site and not _atoms(site).isdisjoint(_atoms(other))]
        paths = tuple(path for other in others for path in other.paths)
        amounts.append(AmountSite(kind, site.paths, site.count, {takes: range(1, site.count + 1)}, paths))
    return amounts


def _atoms(site: UnitSite) -> set[Axis]:
    return {atom.find() for atom in site.columns.axes}
