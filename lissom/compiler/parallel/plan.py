"""The plan of tensor parallelism: the placement of every value, and the collectives between them.

Sites (`sites.py`) name the axes to shard; weights are sharded wherever these axes occur, and one rule per operator
(`rules/table.py`) infers the placement of its outputs. A value is redistributed where a reader wants another placement. Weights
without a sharded axis, such as a bias after an all-reduce, take the placement that their reader wants.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from lissom.compiler.analysis.axes.axes import Axes, axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.placement import REPLICATED, Placed, Spans, can_gather, sharded
from lissom.compiler.ir.printer import target_text
from lissom.compiler.ir.program import Program
from lissom.compiler.parallel.lone_layers import lone_layers, own_placement
from lissom.compiler.parallel.rules.base import Reading, is_weight
from lissom.compiler.parallel.rules.gathered import gatherings, outcome
from lissom.compiler.parallel.rules.joint import ROUNDS, Exchange, all_exchanges
from lissom.compiler.parallel.rules.table import rule_of
from lissom.compiler.parallel.sites import ShardSite, linear_weights, mixer_sites, shard_sites, spans_of

Known = dict[fx.Node, "Placed | tuple[Placed, ...]"]
Joint = Mapping[fx.Node, tuple[Exchange, ...]]

SHARDED = 0.95
"""The default fraction of the weights of linear layers to shard, where possible."""


@dataclass(frozen=True)
class Redistribution:
    """A value that a reader wants in another placement.

    Attributes:
        value: the value to redistribute.
        reader: its first reader that wants it.
        have: the placement it has.
        want: the placement it gets.
        steps: `all-reduce`, `reduce-scatter`, `all-gather`, `slice`, `mask` (rank 0 keeps the value, the others have zeros) and
            `spread` (a rank's positions, zeros at those of other ranks), in order.
    """

    value: fx.Node
    reader: fx.Node
    have: Placed
    want: Placed
    steps: tuple[str, ...]

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """The collectives among the steps."""
        typed = nodes.tensor_type(self.value)
        return tuple(Exchange(step, typed.shape, typed.dtype) for step in self.steps if step in ROUNDS)


@dataclass(frozen=True)
class Plan:
    """The placements and collectives of a program on `world_size` ranks.

    Attributes:
        placed: the placement of every node.
        sites: the sharded sites.
        left: the sites that stay replicated, with the reason in `obstacle`.
        moves: the redistributions, each value and placement once.
        gathered: operators without a rule that read sharded values.
        joint: the collectives inside operators that work on shards.
        sequence: whether values between the layers are sharded by position where possible.
    """

    world_size: int
    placed: Mapping[fx.Node, Placed | tuple[Placed, ...]]
    sites: tuple[ShardSite, ...]
    left: tuple[ShardSite, ...]
    moves: tuple[Redistribution, ...]
    gathered: tuple[fx.Node, ...]
    joint: Mapping[fx.Node, tuple[Exchange, ...]]
    sequence: bool = False

    @property
    def cost(self) -> tuple[int, int]:
        """The number of collectives before any are merged, and of elements they send; dynamic sizes count as 1."""
        exchanges = [
            exchange for items in (*(move.exchanges for move in self.moves), *self.joint.values()) for exchange in items
        ]
        return len(exchanges), sum(
            ROUNDS[exchange.kind] * math.prod(n for n in exchange.shape if isinstance(n, int)) for exchange in exchanges
        )


class _RefusedError(Exception):
    """A site cannot be sharded.

    Attributes:
        site: its index.
    """

    def __init__(self, site: int, reason: str) -> None:
        super().__init__(reason)
        self.site, self.reason = site, reason


def make_plan(
    program: Program,
    world_size: int,
    *,
    whole: Mapping[fx.Node, str] | None = None,
    layers: Mapping[fx.Node, str] | None = None,
    fraction: float = SHARDED,
    sequence: bool = False,
) -> Plan:
    """The plan for a program.

    Args:
        whole: nodes of sites and layers that the user wants replicated, with the entry of `plan` that names them.
        layers: linear layers the user names, each `column-wise` or `row-wise`.
        fraction: least part of the weights of linear layers to shard: where pairs of layers hold less, other layers are sharded
            by themselves.
        sequence: whether values between the layers are sharded by position.
    """
    program_axes, whole, layers = program.fact(axes), whole or {}, layers or {}
    sites = [
        ShardSite(site.kind, site.node, site.path, {}, f"the plan says so: {whole[site.node]}") if site.node in whole else site
        for site in shard_sites(program, world_size, layers)
    ]
    left = [site for site in sites if site.obstacle]
    sites = [site for site in sites if not site.obstacle]
    pairs = _settle(program, program_axes, sites, left, world_size, sequence)
    lone = lone_layers(program, world_size, pairs.placed, fraction, whole)
    if not lone:
        return pairs
    alone = _settle(program, program_axes, [*pairs.sites, *lone], pairs.left, world_size, sequence)
    unsharded = [readers for weight, readers in linear_weights(program).items() if pairs.placed[weight] == REPLICATED]
    mixers = mixer_sites(program, world_size, [node for readers in unsharded for node in readers if node not in whole])
    if not mixers:
        return alone
    mixed = _settle(program, program_axes, [*pairs.sites, *mixers], pairs.left, world_size, sequence)
    if lone := lone_layers(program, world_size, mixed.placed, fraction, whole):
        mixed = _settle(program, program_axes, [*mixed.sites, *lone], mixed.left, world_size, sequence)
    # Token mixers are sharded by channel where that takes fewer collectives than sharding each of their layers by itself.
    return mixed if mixed.cost <= alone.cost else alone


def _settle(
    program: Program, program_axes: Axes, sites: Sequence[ShardSite], left: Sequence[ShardSite], world_size: int, sequence: bool
) -> Plan:
    """The plan that shards as many of these sites as possible; the others are added to `left`, with the reason."""
    sites, left = list(sites), list(left)
    while True:
        try:
            placed, moves, gathered, joint = _Planner(program, program_axes, sites, world_size, sequence).run()
        except _RefusedError as refusal:
            site = sites.pop(refusal.site)
            left.append(ShardSite(site.kind, site.node, site.path, {}, refusal.reason))
            continue
        return Plan(world_size, placed, tuple(sites), tuple(left), moves, gathered, joint, sequence)


class _Planner:
    """One attempt at a plan for some sites."""

    def __init__(self, program: Program, program_axes: Axes, sites: list[ShardSite], world_size: int, sequence: bool) -> None:
        self.program = program
        self.axes = program_axes
        self.world_size = world_size
        self.sequence = sequence
        self.sharded_axes: dict[Axis, tuple[int, int, int]] = {}
        for number, site in enumerate(sites):
            for atom, parts in site.sharded_axes.items():
                self.sharded_axes.setdefault(atom.find(), (*parts, number))
        self.weights = {
            node: sharded(*((dim, self.planned(node, dim)) for dim in range(nodes.tensor_type(node).rank)))
            for node in program.graph.nodes
            if node.op == "get_attr"
        }
        for number, site in enumerate(sites):
            if site.weight is not None:
                self.weights[site.weight] = own_placement(site, number, world_size)
        self.gathered = {site.node for site in sites if site.weight is not None and site.kind == "gathered layer"}
        self.fixed: set[fx.Node] = set()

    def run(self) -> tuple[Known, tuple[Redistribution, ...], tuple[fx.Node, ...], Joint]:
        """The placements, redistributions, gathered operators and joint collectives, once weights suit their readers.

        Raises:
            _RefusedError: for a site whose shards reach a call that cannot take them.
        """
        while True:
            known, wants, gathered = self._propagate()
            if not self._adapt(known, wants):
                read = self._reading(known)
                joint = {**all_exchanges(self.program.graph, read), **gatherings(read)}
                return known, self._moves(known, wants), gathered, joint

    def planned(self, node: fx.Node, dim: int) -> Spans:
        """The spans of a dimension of a value, from its axis.

        Raises:
            _RefusedError: where the axis mixes sharded and other elements.
        """
        spans = spans_of(self.axes.axis(node, dim), self.sharded_axes)
        if spans is None:
            atoms = [atom.find() for atom in self.axes.axis(node, dim).atoms()]
            number = next(self.sharded_axes[atom][2] for atom in atoms if atom in self.sharded_axes)
            raise _RefusedError(number, f"'{node.name}' mixes sharded and other elements along dimension {dim}")
        return spans

    def _reading(self, known: Known) -> Reading:
        return Reading(known, self.planned, self.world_size, self.program.constant, self.sequence, self.gathered)

    def _propagate(self) -> tuple[Known, dict[fx.Node, list[tuple[fx.Node, Placed]]], tuple[fx.Node, ...]]:
        """The placement of every value, those its readers want, and the operators without a rule that read sharded values."""
        known: Known = {}
        wants: dict[fx.Node, list[tuple[fx.Node, Placed]]] = defaultdict(list)
        gathered: list[fx.Node] = []
        read = self._reading(known)
        for node in self.program.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                known[node] = self.weights.get(node, REPLICATED)
                continue
            if node.op == "output":
                for used in node.all_input_nodes:
                    wants[used].append((node, REPLICATED))
                continue
            propagated = outcome(node, read)
            if propagated.reason:
                self._refuse(node, known, propagated.reason)
            shards = [placed for placed in map(read.of, propagated.wants) if not placed.partial and not placed.is_by_position]
            if shards and rule_of(node) is None:
                gathered.append(node)
            known[node] = propagated.result
            for used in node.all_input_nodes:
                have = known[used]
                if isinstance(have, Placed):
                    wants[used].append((node, propagated.wants.get(used, have)))
        return known, wants, tuple(gathered)

    def _adapt(self, known: Known, wants: Mapping[fx.Node, list[tuple[fx.Node, Placed]]]) -> bool:
        """Give weights the placement that all their readers want, replicated where they differ; True when one changed."""
        changed = False
        for weight, have in self.weights.items():
            wanted = {want for _, want in wants[weight]}
            new = wanted.pop() if len(wanted) == 1 else have if wanted in (set(), {have}) else REPLICATED
            if new == have or (weight in self.fixed and new != REPLICATED):
                continue
            if have.is_sharded or len({want for _, want in wants[weight]}) > 1:
                self.fixed.add(weight)
            self.weights[weight] = new
            changed = True
        return changed

    def _moves(self, known: Known, wants: Mapping[fx.Node, list[tuple[fx.Node, Placed]]]) -> tuple[Redistribution, ...]:
        moves: dict[tuple[fx.Node, Placed], Redistribution] = {}
        for value, readers in wants.items():
            have, wanted = known[value], {want for _, want in readers}
            for reader, want in readers:
                if not isinstance(have, Placed) or have == want or (value, want) in moves:
                    continue
                steps = redistribution_steps(have, want, self.world_size, has_whole=REPLICATED in wanted)
                weight = is_weight(value) and have.is_sharded
                if steps is None or weight:
                    what = target_text(reader.target) if reader.op == "call_function" else "the output"
                    self._refuse(reader, known, f"'{reader.name}' ({what}) needs '{value.name}' as {want}, not {have}")
                moves[value, want] = Redistribution(value, reader, have, want, steps or ())
        order = {node: index for index, node in enumerate(self.program.graph.nodes)}
        return tuple(sorted(moves.values(), key=lambda move: order[move.reader]))

    def _refuse(self, node: fx.Node, known: Known, reason: str) -> None:
        """Give up the site whose shards reach a call that cannot take them.

        Raises:
            _RefusedError: with the site and the reason.
        """
        for used in node.all_input_nodes:
            have = known.get(used)
            for placed in (have,) if isinstance(have, Placed) else have or ():
                for _, spans in () if placed.is_by_position else placed.dims:
                    raise _RefusedError(spans[0].site if spans[0].site >= 0 else spans[-1].site, reason)
        raise AssertionError(f"no argument of '{node.name}' is sharded: {reason}")


def redistribution_steps(have: Placed, want: Placed, world_size: int, *, has_whole: bool = False) -> tuple[str, ...] | None:
    """The steps from one placement to another; None where there are none.

    Args:
        has_whole: whether another reader needs the all-reduced sum, so that each rank can slice its positions from it.
    """
    steps: list[str] = []
    if have.partial and want.is_by_position:
        return ("slice",) if has_whole else ("reduce-scatter",)
    if have.is_by_position and want.partial:
        return ("spread",)
    if have.partial:
        steps.append("all-reduce")
    elif have.is_sharded:
        if not can_gather(have, world_size):
            return None
        steps.append("all-gather")
    if want.partial:
        steps.append("mask")
    elif want.is_sharded:
        sizes = [size for _, spans in want.dims for span in spans for size in (span.outer, span.size, span.inner)]
        if not want.is_by_position and not all(isinstance(size, int) for size in sizes):
            return None
        steps.append("slice")
    return tuple(steps)


def sharded_fraction(program: Program) -> float:
    """The fraction of the weights of linear layers, mixtures of experts included, that the program's placements shard."""
    total, held = 0, 0
    for weight in linear_weights(program):
        placed = nodes.placed(weight)
        count = program.weight(str(weight.target)).numel()
        total += count
        held += count if isinstance(placed, Placed) and placed.is_sharded else 0
    return held / total if total else 1.0
