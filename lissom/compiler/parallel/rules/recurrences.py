"""Placement rules of recurrences: batch, heads and channels may be sharded; tokens and what a token sums over may not."""

from __future__ import annotations

from typing import cast

from torch import fx

from lissom.compiler.ir.dimension_map import shape_of
from lissom.compiler.ir.placement import Spans, sharded
from lissom.compiler.ir.recurrence_letters import HEADS, LETTERS, SHARED, operands_of
from lissom.compiler.parallel.rules.base import Outcome, Reading, replicated, settled

_SHARDABLE = ("batch", HEADS, "channels")


def recurrence(node: fx.Node, read: Reading) -> Outcome:
    """Dimensions of one name are sharded alike; heads that several heads share go with them, or every rank has the only one."""
    found = operands_of(node)
    if any(read.of(item).partial for item, _ in found):
        return replicated(node, read)
    spans: dict[str, Spans] = {}
    for item, names in found:
        for dim, have in read.of(item).dims:
            if names[dim] != SHARED and (names[dim] not in _SHARDABLE or spans.setdefault(names[dim], have) != have):
                return replicated(node, read)
    if not read.fits(dict(enumerate(spans.values()))):
        return replicated(node, read)
    heads = _heads(found)
    wants = {}
    for item, names in found:
        dims = {dim: spans[name] for dim, name in enumerate(names) if name in spans}
        if SHARED in names and HEADS in spans and (count := shape_of(item)[names.index(SHARED)]) != 1:
            if count != heads:
                return replicated(node, read)
            dims[names.index(SHARED)] = spans[HEADS]
        wants[item] = sharded(*dims.items())
    results = (
        sharded(*((dim, spans[name]) for dim, name in enumerate(names) if name in spans)) for names in LETTERS[node.target][1]
    )
    return settled(node, read, tuple(results), wants)


def _heads(found: list[tuple[fx.Node, tuple[str, ...]]]) -> int:
    return next(cast(int, shape_of(item)[names.index(HEADS)]) for item, names in found if HEADS in names)
