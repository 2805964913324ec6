"""Linear layers that belong to no pair and are sharded by themselves.

A pair of layers needs one all-reduce for two weights; a lone layer needs a collective of its own. That pays off where weights
would not fit otherwise, so the largest layers are sharded first, and only until the requested fraction of weights is reached.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import input_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.match import computed_from
from lissom.compiler.ir.placement import REPLICATED, Placed, Span, sharded, single
from lissom.compiler.ir.program import Program
from lissom.compiler.parallel.rules import table as rules
from lissom.compiler.parallel.rules.base import Reading
from lissom.compiler.parallel.sites import ShardSite, linear_weights

aten = torch.ops.aten


def lone_layers(
    program: Program,
    world_size: int,
    placed: Mapping[fx.Node, Placed | tuple[Placed, ...]],
    fraction: float,
    whole: Collection[fx.Node],
) -> list[ShardSite]:
    """The layers to shard by themselves so that this fraction of the weights of linear layers is sharded.

    Of layers of one size, all or none are sharded.

    Args:
        placed: the placements without them.
        whole: layers the user wants replicated.
    """
    layers = linear_weights(program)
    sizes = {weight: program.weight(str(weight.target)).numel() for weight in layers}
    by_size: dict[int, list[fx.Node]] = defaultdict(list)
    sharded_size, lone = 0, list[ShardSite]()
    for weight, size in sizes.items():
        have = placed[weight]
        if isinstance(have, Placed) and have.is_sharded:
            sharded_size += size
        else:
            by_size[size].append(weight)
    for size in sorted(by_size, reverse=True):
        if sharded_size >= fraction * sum(sizes.values()):
            break
        for weight in by_size[size]:
            sites = [_alone(layer, weight, world_size) for layer in layers[weight]]
            chosen = [site for site in sites if site is not None and site.node not in whole]
            if len(chosen) == len(sites) and len({(site.kind, site.dim) for site in chosen}) == 1:
                lone += chosen
                sharded_size += size
    return lone


def own_placement(site: ShardSite, number: int, world_size: int) -> Placed:
    """The placement of the weight of a layer that is sharded by itself.

    Args:
        number: index of the site in the plan.
    """
    size = nodes.tensor_type(site.weight).shape[site.dim]
    return sharded((site.dim, (Span(1, size, 1, world_size, site=number),)))


def _alone(layer: fx.Node, weight: fx.Node, world_size: int) -> ShardSite | None:
    """The site of one layer: column-wise where each rank gets a feature, else row-wise; None where neither is possible.

    Per-head weights (`bmm`) stay whole: PyTorch infers no type for `baddbmm` with a broadcast bias and dynamic sizes.
    """
    if layer.target in (aten.bmm.default, aten.baddbmm.default):
        return None
    features, read = (nodes.tensor_type(value).shape[-1] for value in (layer, input_of(layer)))
    path = nodes.origin(layer).module_path
    for kind, size in (("gathered layer", features), ("summed layer", read)):
        if not isinstance(size, int) or size < world_size:
            continue
        for dim in range(nodes.tensor_type(weight).rank):
            site = ShardSite(kind, layer, path, {}, weight=weight, dim=dim)
            output = _result(layer, weight, own_placement(site, 0, world_size), world_size)
            if output.partial if kind == "summed layer" else output.spans(nodes.tensor_type(layer).rank - 1):
                return site
    return None


def _result(layer: fx.Node, weight: fx.Node, placed: Placed, world_size: int) -> Placed:
    """The placement of a layer's output when its weight has this placement and its input is replicated."""
    others = [operand for operand in layer.all_input_nodes if operand is not input_of(layer)]
    between = [used for used in computed_from(others, lambda used: used is not weight) if used.op == "call_function"]
    known: dict[fx.Node, Placed | tuple[Placed, ...]] = defaultdict(lambda: REPLICATED)
    known[weight] = placed
    read = Reading(known, world_size=world_size)
    for call in [*reversed(between), layer]:
        known[call] = rules.outcome(call, read).result
    return single(known[layer])
