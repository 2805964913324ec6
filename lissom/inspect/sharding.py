"""A tensor-parallel plan as a table: placements of each layer's weights, bytes per rank, communication."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
from rich.table import Table
from rich.text import Text
from torch import fx

from lissom.compiler.analysis.cost import example_sizes, size_numbers
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.collectives import ALL_GATHER, ALL_REDUCE, COLLECTIVES, REDUCE_SCATTER
from lissom.compiler.ir.placement import Placed, local_size
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import Size, fixed, substitute
from lissom.compiler.parallel.plan import Plan, Redistribution
from lissom.compiler.parallel.rules.joint import ROUNDS, Exchange
from lissom.inspect.folding import fold_rows
from lissom.inspect.roofline import digits, sizes_text
from lissom.inspect.tables import plain_table

_KINDS: Mapping[object, str] = {ALL_REDUCE: "all-reduce", REDUCE_SCATTER: "reduce-scatter", ALL_GATHER: "all-gather"}


@dataclass(frozen=True)
class Link:
    """The links between ranks.

    Attributes:
        latency_seconds: of one message.
        bytes_per_second: of one rank's link, in one direction.
    """

    latency_seconds: float
    bytes_per_second: float

    def seconds(self, sent_bytes: float, messages: int) -> float:
        """latency · messages + bytes / bandwidth."""
        return self.latency_seconds * messages + sent_bytes / self.bytes_per_second


@dataclass(frozen=True)
class Traffic:
    """The cost of one collective.

    On a ring of N ranks an all-gather sends (N - 1) / N of the value in N - 1 messages, and an all-reduce twice that: Thakur,
    Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH", §4.

    Attributes:
        payload_bytes: of the whole value.
        sent_bytes: sent by each rank.
        messages: the number of consecutive messages.
    """

    kind: str
    payload_bytes: float
    sent_bytes: float
    messages: int


def traffic(plan: Plan, move: Redistribution, numbers: Mapping[sympy.Symbol, int]) -> list[Traffic]:
    """The collectives of a redistribution.

    Args:
        numbers: the sizes of a call.
    """
    return [_exchanged(plan.world_size, exchange, numbers) for exchange in move.exchanges]


def joint_traffic(plan: Plan, numbers: Mapping[sympy.Symbol, int]) -> list[tuple[fx.Node, Traffic]]:
    """The small collectives inside sharded operators, such as the range of activations that are quantized in shards."""
    return [
        (node, _exchanged(plan.world_size, exchange, numbers))
        for node, exchanges in plan.joint.items()
        for exchange in exchanges
    ]


def program_traffic(program: Program, world_size: int, numbers: Mapping[sympy.Symbol, int]) -> list[Traffic]:
    """The collectives of a partitioned program, or of one rank's program.

    Args:
        numbers: the sizes of a call.
    """
    collectives: list[Traffic] = []
    for node in program.nodes(*COLLECTIVES):
        # The whole value is the input of a reduce-scatter, and the output of the others.
        typed = nodes.tensor_type(nodes.operand(node) if node.target is REDUCE_SCATTER else node)
        collectives.append(_exchanged(world_size, Exchange(_KINDS[node.target], typed.shape, typed.dtype), numbers))
    return collectives


def _exchanged(world_size: int, exchange: Exchange, numbers: Mapping[sympy.Symbol, int]) -> Traffic:
    payload = math.prod(_number(size, numbers) for size in exchange.shape) * exchange.dtype.itemsize
    rounds = ROUNDS[exchange.kind]
    return Traffic(exchange.kind, payload, rounds * payload * (world_size - 1) / world_size, rounds * (world_size - 1))


def _number(size: Size, numbers: Mapping[sympy.Symbol, int]) -> int:
    return size if isinstance(size, int) else int(substitute(size, {a: sympy.Integer(b) for a, b in numbers.items()}))


def rank_bytes(weight: fx.Node, placed: Placed) -> int:
    """The bytes a rank holds of a weight."""
    typed = nodes.tensor_type(weight)
    sizes = [fixed(local_size(placed.spans(dim), size)) for dim, size in enumerate(typed.shape)]
    return math.prod(sizes) * typed.dtype.itemsize


def sharding_table(program: Program, plan: Plan, sizes: Mapping[str, int], link: Link) -> Table:
    """One row per layer: the placement of its weights, their bytes on a rank, its collectives, and their minimum time.

    Args:
        sizes: sizes of dimensions by name; the others are the example's.

    Raises:
        UnsupportedError: for a dimension the program does not have, or a size it does not take.
    """
    chosen = example_sizes(program) | dict(sizes)
    numbers = size_numbers(program, chosen)
    layers = layer_paths(program)
    rows: dict[str, _Row] = {path: _Row() for path in layers}
    for node, placed in plan.placed.items():
        if node.op == "get_attr" and isinstance(placed, Placed) and nodes.is_tensor(node):
            rows[layer_of(str(node.target), layers)].weights.append((node, placed))
    pairs = [(move.value, collective) for move in plan.moves for collective in traffic(plan, move, numbers)]
    for node, collective in [*pairs, *joint_traffic(plan, numbers)]:
        rows[layer_of(nodes.origin(node).module_path, layers)].traffic.append(collective)
    table = plain_table(
        f"{program.name} on {plan.world_size} ranks, {sizes_text(chosen)}",
        _caption(link, _tokens(plan, numbers), rows, _by_position(plan, numbers)),
    )
    for heading in ("layer and its sharded weights", "collectives"):
        table.add_column(heading, overflow="fold")
    for heading in ("MB of\na rank", "% of\nwhole", "KB\nmoved", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    total = _Row()
    for row in rows.values():
        total.weights += row.weights
        total.traffic += row.traffic
    written = [(name, _placements(row.weights, name), _kinds(row.traffic), *_numbers(row, link)) for name, row in rows.items()]
    for name, placements, *cells in fold_rows(written):
        table.add_row(*map(Text, (f"{name}{placements}", *cells)))
    table.add_section()
    table.add_row("all", _kinds(total.traffic), *_numbers(total, link))
    return table


class _Row:
    """The weights of one layer with their placements, and its collectives."""

    def __init__(self) -> None:
        self.weights: list[tuple[fx.Node, Placed]] = []
        self.traffic: list[Traffic] = []


def layer_paths(program: Program) -> list[str]:
    """The module paths of the layers, and `other`, for all that is in none."""
    return [*(layer.path for layer in program.fact(structure).layers), "other"]


def layer_of(path: str, layers: Sequence[str]) -> str:
    """The layer that holds a module or weight; `other` if none does."""
    return next((layer for layer in layers if path == layer or path.startswith(f"{layer}.")), "other")


def _placements(weights: Sequence[tuple[fx.Node, Placed]], layer: str) -> str:
    """A line for each placement except `Replicate`, such as `Shard(0)`, followed by its modules, or by a single parameter."""
    groups: dict[str, dict[str, list[str]]] = {}
    for node, placed in weights:
        if not placed.is_replicated:
            module, _, parameter = str(node.target).removeprefix(f"{layer}.").rpartition(".")
            groups.setdefault(str(placed), {}).setdefault(module, []).append(parameter)
    lines: list[str] = []
    for how, modules in sorted(groups.items()):
        names = (module if len(parameters) > 1 else f"{module}.{parameters[0]}" for module, parameters in modules.items())
        lines += [f"\n  {how}", *(f"\n    {name.removeprefix('.')}" for name in names)]
    return "".join(lines)


def _kinds(collectives: Sequence[Traffic]) -> str:
    counts = Counter(collective.kind for collective in collectives)
    ordered = [(kind, counts[kind]) for kind in ROUNDS if counts[kind]]
    return ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in ordered)


def _numbers(row: _Row, link: Link) -> list[str]:
    held = sum(rank_bytes(node, placed) for node, placed in row.weights)
    whole = sum(rank_bytes(node, Placed()) for node, _ in row.weights)
    payload = sum(collective.payload_bytes for collective in row.traffic)
    seconds = sum(link.seconds(collective.sent_bytes, collective.messages) for collective in row.traffic)
    return [digits(held / 1e6), f"{100 * held / whole:.1f}" if whole else "", digits(payload / 1e3), digits(1e3 * seconds)]


def _tokens(plan: Plan, numbers: Mapping[sympy.Symbol, int]) -> int:
    """The number of tokens of a call: the largest among the redistributed values."""
    shapes = [nodes.tensor_type(move.value).shape[:-1] for move in plan.moves if move.steps]
    return max((math.prod(_number(size, numbers) for size in shape) for shape in shapes), default=1)


def _by_position(plan: Plan, numbers: Mapping[sympy.Symbol, int]) -> tuple[float, float]:
    """The bytes of all values sharded by position, and the bytes of their shards on one rank."""
    whole, held = 0.0, 0.0
    for node, placed in plan.placed.items():
        if isinstance(placed, Placed) and placed.is_by_position:
            typed = nodes.tensor_type(node)
            sizes = [_number(size, numbers) for size in typed.shape]
            size = math.prod(sizes) * typed.dtype.itemsize
            whole, held = whole + size, held + size / sizes[1] * -(-sizes[1] // plan.world_size)
    return whole, held


def _caption(link: Link, tokens: int, rows: Mapping[str, _Row], by_position: tuple[float, float]) -> str:
    """The legend of the table, and the communication per token of the call."""
    payload = sum(collective.payload_bytes for row in rows.values() for collective in row.traffic)
    sent = sum(collective.sent_bytes for row in rows.values() for collective in row.traffic)
    whole, held = (size / tokens / 1e3 for size in by_position)
    stream = (
        f"Between the layers: {whole:.3g} KB of values sharded by position, {held:.3g} KB of them on a rank.\n" if whole else ""
    )
    return (
        f"KB moved: of values reduced or gathered.\n"
        f"Each token: {payload / tokens / 1e3:.3g} KB reduced or gathered, {sent / tokens / 1e3:.3g} KB sent by each rank.\n"
        f"{stream}"
        f"Times are those of rings: {link.latency_seconds * 1e6:g} µs a message, {link.bytes_per_second / 1e9:g} GB/s a link."
    )
