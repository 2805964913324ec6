"""The weights that compute an attention's keys or values, and those of their readers that can be refitted.

Keys are read by queries, values by the output projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.columns import WeightUnits, unit_of
from lissom.compiler.analysis.structure.linear import input_of
from lissom.compiler.analysis.structure.matrix import matrix_of, readers_of
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.calibration.statistics import Moments
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.transforms.heads.key_value_heads import SeparateHeads, Separation
from lissom.compiler.transforms.heads.layers import HeadLayer, is_moved
from lissom.passes.attention.pool_heads.pooling import Pooled, Products


@dataclass(frozen=True)
class Factors:
    """The keys, or the values, of an attention.

    Attributes:
        rows: all slices of weights that compute them.
        made: the layer that computes them, where it has all of these.
        read: the layer that reads them, where it can be refitted.
        keys: whether they are keys.
    """

    rows: tuple[WeightUnits, ...]
    made: HeadLayer | None
    read: HeadLayer | None
    keys: bool

    def products(self, program: Program, known: Mapping[fx.Node, Moments], *, align: bool) -> Products:
        """The products that pooling approximates: with the readers of the heads, or the heads alone if readers stay fixed."""
        if self.made is None:
            right = torch.cat([rows.read(program).flatten(1) for rows in self.rows], 1).double().cpu()[:, None]
            return Products(torch.ones(len(right), 1, 1, dtype=torch.float64), right, None, fitted=False)
        right, moment = self.made.read(program), self.made.moment(known)
        if self.read is None or not align:
            left = torch.eye(right.shape[1], dtype=torch.float64).expand(len(right), -1, -1)
            return Products(left, right, moment, fitted=False)
        rows = self.read.read(program)
        if not self.keys:
            return Products(rows @ rows.mT, right, moment, fitted=True)
        if self.made.bias is not None:
            right, moment = right[..., :-1], moment[:-1, :-1]
        return Products(rows @ self.read.moment(known) @ rows.mT, right, _centred(moment, self.made, known), fitted=True)

    def write(self, edit: Editor, pooled: Sequence[Pooled], size: int, *, align: bool) -> None:
        """Replace the heads of every group by its pooled head, and refit their readers."""
        if self.made is None or self.read is None or not align:
            for rows in self.rows:
                held = rows.read(edit.program)
                mean = held.float().unflatten(0, (-1, size)).mean(1)
                rows.write(edit, mean.repeat_interleave(size, 0))
            return
        right = torch.stack([head.right for head in pooled]).repeat_interleave(size, 0)
        if self.keys and self.made.bias is not None:
            right = torch.cat([right, torch.zeros_like(right[..., :1])], -1)
        self.made.write(edit, right)
        mix = torch.cat([head.mix for head in pooled])
        self.read.write(edit, mix.mT @ self.read.read(edit.program))


def key_factors(program: Program, separation: Separation, heads: SeparateHeads) -> Factors:
    """The keys of an attention, and the queries that read them."""
    site, program_axes = heads.site, separation.axes
    rows = tuple(separation.rows(heads.key))
    queries, keys = separation.queries(heads), heads.keys
    made = _layer(program, separation, heads.key, program_axes.axis(keys, 3), site.k, rows)
    read = _layer(
        program, separation, heads.queries, program_axes.axis(queries, 3), site.q, tuple(separation.rows(heads.queries))
    )
    if made is None or read is None or not separation.is_alone(heads, heads.key, heads.queries):
        return Factors(rows, made, None, keys=True)
    # A bias of the keys adds the same number to all scores of a query, which a soft-cap or a sink does not pass over.
    fits = made.bias is None or (site.softcap is None and not site.sinks)
    fits = fits and is_moved(keys, made.layer, kept=True) and is_moved(queries, read.layer, kept=True)
    return Factors(rows, made, read if fits else None, keys=True)


def value_factors(program: Program, separation: Separation, heads: SeparateHeads) -> Factors:
    """The values of an attention, and the output projection that reads them."""
    site, program_axes = heads.site, separation.axes
    rows = tuple(separation.rows(heads.value))
    made = _layer(program, separation, heads.value, program_axes.axis(heads.values, 3), site.v, rows)
    read = None
    if site.output is not None and made is not None and separation.is_alone(heads, heads.value):
        matrix = matrix_of(site.output)
        columns = [part for part in separation.rows(heads.output) if not isinstance(matrix, str) and part.weight is matrix.node]
        read = _layer(program, separation, heads.output, program_axes.axis(site.node, 3), (site.output,), columns)
        if not (is_moved(heads.values, made.layer, kept=True) and is_moved(input_of(site.output), site.node, kept=True)):
            read = None
    return Factors(rows, made, read, keys=False)


def projection_inputs(program: Program) -> list[fx.Node]:
    """The inputs of a program's query, key and value projections."""
    layers = [layer for site in program.fact(structure).attention for layer in (*site.q, *site.k, *site.v)]
    return list(dict.fromkeys(input_of(layer) for layer in layers if not isinstance(matrix_of(layer), str)))


def _layer(
    program: Program, separation: Separation, axis: Axis, features: Axis, layers: Sequence[fx.Node], rows: Sequence[WeightUnits]
) -> HeadLayer | None:
    """The only layer with heads of this axis, with its rows per head; None where other weights have them too."""
    if len(layers) != 1 or features.form != "atom" or isinstance(matrix := matrix_of(layers[0]), str):
        return None
    layer = layers[0]
    if readers_of(matrix.node) != [layer]:
        return None
    by_kind: dict[str, WeightUnits] = {}
    for part in rows:
        if part.name in program.state and not program.weight(part.name).any():
            continue
        kind = "weight" if part.weight is matrix.node else "bias" if layer in part.weight.users else ""
        unit = unit_of(separation.axes.axis(part.weight, part.dim), [features])
        indices = part.by_unit()
        in_order = torch.equal(unit[indices], torch.arange(indices.shape[1]).expand_as(indices))
        if not kind or kind in by_kind or len(part.weight.users) > 1 or not in_order:
            return None
        by_kind[kind] = part
    return HeadLayer(layer, by_kind["weight"], by_kind.get("bias")) if "weight" in by_kind else None


def _centred(moment: torch.Tensor, made: HeadLayer, known: Mapping[fx.Node, Moments]) -> torch.Tensor:
    """The covariance: a component common to all keys adds the same to all scores of a query."""
    moments = known.get(input_of(made.layer))
    if moments is None or len(moments.total) != len(moment):
        return moment
    mean = moments.total.double().cpu() / max(moments.count, 1)
    return moment - torch.outer(mean, mean)
