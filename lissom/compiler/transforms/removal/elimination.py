"""The common part of the `eliminate-dead` rewrites: remove dead units, and replace constant branches."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from lissom.compiler.analysis.axes.axes import Axes, axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.base import of
from lissom.compiler.analysis.axes.columns import Columns, unit_of
from lissom.compiler.analysis.axes.dead_units import dead_units
from lissom.compiler.analysis.structure.linear import bias_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as ops
from lissom.compiler.ir.dimension_map import dimension_map
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.printer import target_text
from lissom.compiler.ir.types import Size, fixed
from lissom.compiler.transforms.removal.indices import remove_indices
from lissom.errors import LissomError, UnsupportedError

aten = torch.ops.aten


@dataclass(frozen=True)
class Plan:
    """The removal of a site's dead units.

    Attributes:
        node: the node of the site.
        removed: indices of axes.
        order: for each index of the first axis, the order of its units to apply first, so that removed units have the same
            index everywhere; None when they already have.
        left: dead units that stay.
    """

    node: fx.Node
    numbering: tuple[Axis, ...]
    removed: Mapping[Axis, tuple[int, ...]]
    order: torch.Tensor | None
    left: tuple[int, ...]


def plan_of(node: fx.Node, numbering: tuple[Axis, ...], dead: torch.Tensor) -> Plan:
    """The largest removal of dead units of one site: whole indices of any axis, and as many units from each remaining index.

    Args:
        dead: [sizes of the axes]. At least one unit is left; when all are dead, the branch is a constant.
    """
    dead = dead.clone()
    if bool(dead.all()):
        dead.view(-1)[0] = False
    gone, removed = torch.zeros_like(dead), dict[Axis, tuple[int, ...]]()
    for dim, atom in enumerate(numbering):
        whole = dead.all([other for other in range(dead.dim()) if other != dim]) if dead.dim() > 1 else dead
        if bool(whole.any()):
            removed[atom] = tuple(whole.nonzero().flatten().tolist())
            gone.index_fill_(dim, whole.nonzero().flatten(), True)
    order = None
    if len(numbering) == 2:
        order, more = _evened(dead, gone)
        if more:
            removed[numbering[1]] = tuple(sorted({*removed.get(numbering[1], ()), *more}))
            gone[:, list(more)] = True
            dead = dead.gather(1, order)
        else:
            order = None
    left = (dead & ~gone).flatten().nonzero().flatten()
    if order is not None:
        places = torch.arange(dead.numel()).reshape(dead.shape).gather(1, order).flatten()
        left = places[left]
    return Plan(node, numbering, removed, order, tuple(sorted(left.tolist())))


def _evened(dead: torch.Tensor, gone: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """An order of the units of each row with equally many dead units last in every row, and their places.

    Args:
        dead: [rows, units]; rows and columns that are removed whole are ignored.
        gone: likewise.
    """
    rows = ~gone.all(1)
    columns = ~gone.all(0) if bool(rows.any()) else torch.zeros(dead.shape[1], dtype=torch.bool)
    spare = dead[rows][:, columns].sum(1)
    count = int(spare.min()) if len(spare) else 0
    order = torch.arange(dead.shape[1]).repeat(dead.shape[0], 1)
    places = columns.nonzero().flatten()
    for row in rows.nonzero().flatten().tolist():
        order[row, places] = places[torch.argsort(dead[row, places].int(), stable=True)]
    return order, tuple(places[len(places) - count :].tolist()) if count else ()


def reorder(edit: Editor, program_axes: Axes, numbering: Sequence[Axis], order: torch.Tensor) -> None:
    """Reorder the units of every row in all weights that have them; the outputs do not change.

    Args:
        numbering: the axes of rows and of units in a row.
        order: [rows, units], the unit for each place.

    Raises:
        UnsupportedError: when a weight has the axis of units without that of rows.
    """
    rows, units = (atom.find() for atom in numbering)
    moved: list[tuple[fx.Node, torch.Tensor]] = []
    for node in program_axes.of:
        if node.op != "get_attr":
            continue
        weight = edit.tensor(node)
        for dim, axis in enumerate(of(node, program_axes.of)):
            atoms = set(axis.atoms())
            if units not in atoms:
                continue
            if rows not in atoms:
                raise UnsupportedError(f"'{node.target}' has the same entry for a place in every group")
            weight = weight.index_select(dim, places_of(axis, rows, units, order).to(weight.device))
            moved.append((node, weight))
    for node, weight in moved:
        edit.set_weight(node, weight, retype=False)


def places_of(axis: Axis, rows: Axis, units: Axis, order: torch.Tensor) -> torch.Tensor:
    """For each index of an axis, the index whose entry moves there."""
    row, unit = unit_of(axis, [rows]), unit_of(axis, [units])
    within = torch.zeros(len(row), dtype=torch.long)
    seen: dict[tuple[int, int], int] = {}
    where: dict[tuple[int, int, int], int] = {}
    for index, key in enumerate(zip(row.tolist(), unit.tolist(), strict=True)):
        within[index] = seen.get(key, 0)
        seen[key] = seen.get(key, 0) + 1
        where[(*key, int(within[index]))] = index
    places = torch.arange(len(row))
    for index in range(len(row)):
        if row[index] >= 0 and unit[index] >= 0:
            source = int(order[row[index], unit[index]])
            places[index] = where[(int(row[index]), source, int(within[index]))]
    return places


def obstacle(edit: Editor, numbering: Sequence[Axis]) -> str | None:
    """The reason units numbered by these axes cannot be removed; None if they can."""
    program_axes = edit.program.fact(axes)
    if not numbering:
        return "they are not numbered by an axis of their own"
    return next((reason for atom in numbering if (reason := program_axes.obstacle(atom))), None)


def eliminate(edit: Editor, sites: Sequence[tuple[fx.Node, tuple[Axis, ...]]], units: str) -> None:
    """Remove the dead units of several sites; dead units that must stay are reported.

    Args:
        sites: for each, its node and the axes that number its units.
        units: their name, `heads`.
    """
    plans = [plan_of(node, numbering, dead_units(edit.program, numbering)) for node, numbering in sites]
    for plan in plans:
        if plan.left:
            numbers = ", ".join(map(str, plan.left[:8]))
            numbers += f" and {len(plan.left) - 8} more" if len(plan.left) > 8 else ""
            edit.skip(plan.node, f"dead {units} {numbers} stay: each group keeps as many as every other")
    plans = [plan for plan in plans if plan.removed]
    if not plans:
        return
    places = [[_place(edit.program.fact(axes), atom) for atom in plan.numbering] for plan in plans]
    try:
        _apply(edit, plans)
    except LissomError:
        for plan, plan_places in zip(plans, places, strict=True):
            _eliminate_alone(edit, plan.node, plan_places, units)


def _eliminate_alone(edit: Editor, node: fx.Node, places: Sequence[tuple[fx.Node, int, int]], units: str) -> None:
    """Remove the dead units of one site, or report why they stay."""
    program_axes = edit.program.fact(axes)
    numbering = tuple(list(program_axes.axis(reader, dim).atoms())[index] for reader, dim, index in places)
    plan = plan_of(node, numbering, dead_units(edit.program, numbering))
    try:
        if plan.removed:
            _apply(edit, [plan])
    except LissomError as error:
        edit.skip(node, f"dead {units} stay: {error}")


def _place(program_axes: Axes, atom: Axis) -> tuple[fx.Node, int, int]:
    """A dimension that has the axis, and the index of the atom in it, to find the axis again after the program changed."""
    place = program_axes.occurrences(atom)[0]
    return place.node, place.dim, list(program_axes.axis(place.node, place.dim).atoms()).index(atom.find())


def _apply(edit: Editor, plans: Sequence[Plan]) -> None:
    program_axes = edit.program.fact(axes)
    removed: dict[Axis, set[int]] = {}
    for axis, indices in (removal for plan in plans for removal in plan.removed.items()):
        removed.setdefault(axis, set()).update(indices)
    ordered: set[Axis] = set()
    for plan in plans:
        if plan.order is not None and ordered.isdisjoint(plan.numbering):
            reorder(edit, program_axes, plan.numbering, plan.order)
            ordered.update(plan.numbering)
    remove_indices(edit, removed, program_axes)


def replace_dead(edit: Editor, candidates: Sequence[Columns], units: str) -> None:
    """Replace layers that read dead units only by their bias; those that cannot be replaced are reported."""
    for columns in candidates:
        if columns.alone and (reason := replace_by_constant(edit, columns.layer)):
            edit.skip(columns.layer, f"all {units} it reads are dead, but {reason}")


def replace_by_constant(edit: Editor, layer: fx.Node) -> str | None:
    """Replace a linear layer whose weight is zero by its bias; returns why that is impossible, None when done.

    A sum with the layer becomes a sum with the bias, or is removed when there is no bias.
    """
    if layer.target not in ops.LINEAR_PRODUCTS:
        return f"{target_text(layer.target)} has no bias that goes with its last dimension"
    return _replace(edit, layer, bias_of(layer))


def _replace(edit: Editor, constant: fx.Node, bias: fx.Node | None) -> str | None:
    """Replace a value that equals the bias at every position, in sums, also through calls that only move positions."""
    reasons = [_replace(edit, user, bias) for user in list(constant.users) if _keeps_features(user)]
    for user in list(constant.users):
        _simplify_sum(edit, user, constant, bias)
    living = [user for user in constant.users if user.users or user.op == "output"]
    if any(reasons) or not living:
        return next(filter(None, reasons), None)
    return _expand(edit, constant, bias)


def _keeps_features(node: fx.Node) -> bool:
    """True for calls that only move positions and keep the last dimension last."""
    source = node.args[0] if node.args else None
    if not nodes.is_tensor(node) or not nodes.is_tensor(source):
        return False
    if not nodes.is_call(node, *ops.TRANSPOSES, aten.permute.default, *ops.RESHAPES, *ops.COPIES):
        return False
    sources = dimension_map(node)
    return bool(sources) and sources[-1] == nodes.tensor_type(source).rank - 1


def _simplify_sum(edit: Editor, user: fx.Node, constant: fx.Node, bias: fx.Node | None) -> None:
    if not nodes.is_call(user, aten.add.Tensor) or user.kwargs or len(user.args) != 2:
        return
    left, right = user.args
    other = right if left is constant else left
    if other is constant or not nodes.is_tensor(other) or nodes.node_type(other) != nodes.node_type(user):
        return
    if bias is None:
        edit.replace(user, other)
    else:
        edit.replace_by(user, aten.add.Tensor, other, bias)


def _expand(edit: Editor, constant: fx.Node, bias: fx.Node | None) -> str | None:
    typed = nodes.tensor_type(constant)
    inputs = {
        size: (node, dim)
        for node in edit.program.placeholders
        if nodes.is_tensor(node)
        for dim, size in enumerate(nodes.tensor_type(node).shape)
    }
    factors = [list(sympy.Mul.make_args(sympy.sympify(size))) for size in typed.shape]
    if not all(factor in inputs for size_factors in factors for factor in size_factors if not factor.is_Integer):
        return "its sizes are not those of the inputs"
    with edit.before(constant):
        if bias is None:
            zero = torch.zeros(fixed(typed.shape[-1]), dtype=typed.dtype, device=typed.device)
            bias = edit.weight(f"{constant.name}.zero", zero)
        sizes = [_computed(edit, size_factors, inputs) for size_factors in factors]
        edit.replace(constant, edit.call(aten.expand.default, bias, sizes))
    return None


def _computed(edit: Editor, factors: Sequence[sympy.Expr], inputs: Mapping[Size, tuple[fx.Node, int]]) -> fx.Node | int:
    """The product of numbers and of sizes of the inputs."""
    total: fx.Node | int = 1
    for factor in factors:
        size = int(factor) if factor.is_Integer else edit.size(*inputs[factor])
        if isinstance(size, fx.Node):
            total = size if total == 1 else edit.compute_size(operator.mul, size, total)
        else:
            total = edit.compute_size(operator.mul, total, size) if isinstance(total, fx.Node) else total * size
    return total
