"""A tensor-parallel plan as an SVG picture: the shards of the weights of each layer, and where ranks communicate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from lissom.compiler.analysis.cost import example_sizes, size_numbers
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.placement import Placed
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import format_type
from lissom.compiler.parallel.plan import Plan
from lissom.inspect.folding import fold_names
from lissom.inspect.roofline import digits, sizes_text
from lissom.inspect.sharding import Traffic, joint_traffic, layer_of, layer_paths, traffic
from lissom.inspect.svg.canvas import CODE_WIDTH, LABEL_WIDTH, RANK_COLORS, Canvas

_MARGIN = 16.0
_TOP = 76.0
_HEADER = 30.0
_ICON = 56.0
_ROW = 44.0
_BAR = 34.0


@dataclass(frozen=True)
class Row:
    """A row of a layer: a sharded weight, or a collective.

    Attributes:
        axis: of the weight; None for a collective.
    """

    label: str
    detail: str
    axis: int | None = None


def sharding_svg(program: Program, plan: Plan, sizes: Mapping[str, int] | None = None) -> str:
    """The picture of a plan: for each layer its sharded weights and its collectives, in the order of the program.

    Args:
        sizes: sizes of dimensions by name; the others are the example's. Replicated weights are counted, and not drawn.

    Raises:
        UnsupportedError: for a dimension the program does not have, or a size it does not take.
    """
    chosen = example_sizes(program) | dict(sizes or {})
    layers = layer_paths(program)
    rows: dict[str, list[Row]] = {path: [] for path in layers}
    replicated = dict.fromkeys(layers, 0)
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    weights = [(node, placed) for node, placed in plan.placed.items() if node.op == "get_attr" and nodes.is_tensor(node)]
    placed_rows: list[tuple[int, str, Row]] = []
    for node, placed in weights:
        layer = layer_of(str(node.target), layers)
        if isinstance(placed, Placed) and placed.is_sharded:
            first = min((order[reader] for reader in node.users), default=order[node])
            placed_rows.append((first, layer, _weight_row(program, node, placed, layer)))
        else:
            replicated[layer] += 1
    numbers = size_numbers(program, chosen)
    moved = [(move.value, collective) for move in plan.moves for collective in traffic(plan, move, numbers)]
    for node, collective in [*moved, *joint_traffic(plan, numbers)]:
        layer = layer_of(nodes.origin(node).module_path, layers)
        placed_rows.append((order[node], layer, _collective_row(node, collective, layer)))
    for _, layer, row in sorted(placed_rows, key=lambda entry: entry[0]):
        rows[layer].append(row)
    parts = [(layer, tuple(rows[layer]), replicated[layer]) for layer in layers if rows[layer] or replicated[layer]]
    title = f"{program.name} on {plan.world_size} ranks, {sizes_text(chosen)}"
    return _draw(title, plan.world_size, _folded(parts))


def _weight_row(program: Program, node: fx.Node, placed: Placed, layer: str) -> Row:
    name = str(node.target).removeprefix(f"{layer}.")
    return Row(name, f"{format_type(nodes.node_type(node), program.signature.name_of)} {placed}", placed.dims[0][0])


def _collective_row(node: fx.Node, collective: Traffic, layer: str) -> Row:
    where = nodes.origin(node).module_path.removeprefix(layer).removeprefix(".") or node.name
    return Row(f"{collective.kind} of the output of {where}", f"{digits(collective.payload_bytes / 1e3)} KB a call")


Part = tuple[str, tuple[Row, ...], int]


def _folded(parts: Sequence[Part]) -> list[Part]:
    """The layers, with those that have equal rows merged under one name."""
    groups: dict[tuple[tuple[Row, ...], int], list[str]] = {}
    for name, rows, replicated in parts:
        groups.setdefault((rows, replicated), []).append(name)
    return [(fold_names(names), *key) for key, names in groups.items()]


def _draw(title: str, world_size: int, parts: Sequence[Part]) -> str:
    canvas = Canvas()
    labels = [f"{row.label}{row.detail if row.axis is None else ''}" for _, rows, _ in parts for row in rows]
    lines = [title, *labels, *(name for name, _, _ in parts), *(row.detail for _, rows, _ in parts for row in rows)]
    width = 2 * _MARGIN + _ICON + 40 + max(LABEL_WIDTH, CODE_WIDTH) * max(map(len, lines))
    canvas.text(_MARGIN, 24, title, "strong title")
    x = _MARGIN
    for rank in range(min(world_size, RANK_COLORS)):
        canvas.rect(x, 40, 12, 12, f"rank{rank}", radius=2)
        canvas.text(x + 18, 50, f"rank {rank}", "quiet")
        x += 72
    if world_size > RANK_COLORS:
        canvas.text(x, 50, f"and {world_size - RANK_COLORS} more in the same colors", "quiet")
    y = _TOP
    for name, rows, replicated in parts:
        height = _HEADER + sum(_BAR if row.axis is None else _ROW for row in rows) + (22 if replicated else 0) + 6
        canvas.rect(_MARGIN, y, width - 2 * _MARGIN, height, "frame")
        canvas.text(_MARGIN + 12, y + 20, name, "strong")
        at = y + _HEADER
        for row in rows:
            _draw_row(canvas, row, at, width, world_size)
            at += _BAR if row.axis is None else _ROW
        if replicated:
            words = f"{replicated} weight{'s' if replicated > 1 else ''} replicated on every rank"
            canvas.text(_MARGIN + 12, at + 14, words, "quiet")
        y += height + 12
    return canvas.svg(width, y + 4, title)


def _draw_row(canvas: Canvas, row: Row, y: float, width: float, world_size: int) -> None:
    left = _MARGIN + 12
    if row.axis is None:
        canvas.rect(left, y + 2, width - 2 * left, _BAR - 8, "collective")
        canvas.text(left + 10, y + 19, f"{row.label}, {row.detail}")
        return
    height = _ROW - 8
    for rank in range(world_size):
        kind = f"rank{rank % RANK_COLORS}"
        if row.axis == 0:
            canvas.rect(left, y + rank * height / world_size, _ICON, height / world_size, kind, radius=0)
        else:
            canvas.rect(left + rank * _ICON / world_size, y, _ICON / world_size, height, kind, radius=0)
    canvas.text(left + _ICON + 12, y + 15, row.label, "strong")
    canvas.text(left + _ICON + 12, y + 30, row.detail, "code quiet")
