"""The placement rule of operators whose dimensions are declared (`ir/dimensions.py`).

Dimensions of one name are sharded alike. A sum over a sharded one is a pending sum, `Partial`, where the result is linear in
every operand that has it. What is read as a whole, or by index, is not sharded.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from lissom.compiler.ir.dimensions import Compound, Dim, Named, named, parts_of
from lissom.compiler.ir.placement import PARTIAL, Placed, Spans, sharded
from lissom.compiler.ir.types import product
from lissom.compiler.parallel.rules.base import Outcome, Reading, is_weight, replicated, settled


def by_name(node: fx.Node, read: Reading) -> Outcome:
    """The outcome of a call from the names of its dimensions; replicated where they cannot be sharded as they are."""
    call = named(node)
    if call is None:
        return replicated(node, read)
    pending = _pending(call)
    split = _split(call, read, pending)
    if split is None:
        return replicated(node, read)
    summed = {name: spans for name, spans in split.items() if name in pending}
    if summed and len(split) > 1:
        # A factor sharded along a dimension of its own, another along the one that is summed: the own one gives way.
        split = summed
    elif pending and len(split) > 1 and (own := _of_last_factor(call, split)):
        # Values sharded by position, a weight sharded by features: the values are gathered.
        split = own
    if not read.fits({dim: spans for dim, spans in split.items() if not _is_part(dim, split)}):
        return replicated(node, read)
    if summed:
        spans = next(iter(summed.values()))
        # The padding of a weight is zero, that of a computed value may be anything.
        of_weight = any(is_weight(operand.node) for operand in call.operands if operand.is_factor)
        if (any(span.is_padded for span in spans) and not of_weight) or not read.is_apart(spans):
            return replicated(node, read)
    wants: dict[fx.Node, Placed] = {}
    for operand in call.operands:
        wanted = PARTIAL if summed and operand.is_added else _placed(operand.dims, split)
        if wants.setdefault(operand.node, wanted) != wanted:
            # x · x: one value cannot lie in two ways.
            return replicated(node, read)
    results = [PARTIAL if summed else _placed(dims, split) for dims in call.results]
    return settled(node, read, tuple(results) if len(results) > 1 else results[0], wants)


def _pending(call: Named) -> frozenset[str]:
    """The dimensions whose sum ranks may take by parts: every operand that has one is a factor."""
    return frozenset(call.summed) - {name for operand, _, name in call.places() if not operand.is_factor}


def _split(call: Named, read: Reading, pending: frozenset[str]) -> dict[Dim, Spans] | None:
    """The sharded dimensions of the operands; None where the operator cannot work on parts of them."""
    kept = call.whole | call.normed | call.fixed | call.bound | call.positions | (frozenset(call.summed) - pending)
    split: dict[Dim, Spans] = {}
    for operand in call.operands:
        # What is added or broadcast follows the others.
        for dim, spans in () if operand.is_added or operand.is_broadcast else read.of(operand.node).dims:
            name = operand.dims[dim]
            if operand.opaque or not name or not kept.isdisjoint(parts_of(name)) or split.setdefault(name, spans) != spans:
                return None
    products = {name for operand in call.operands for name in operand.dims if isinstance(name, Compound)}
    for name in products:
        first, *rest = name.parts
        alone = any(part in split for part in rest)
        if call.bound.isdisjoint(name.parts) and (alone or not _goes_with(split, name, first, call)):
            return None
    return split


def _goes_with(split: Mapping[Dim, Spans], dim: Compound, first: str, call: Named) -> bool:
    """True when each rank holds the indices of a product that belong to those of its first part that it holds.

    For attention: the query heads of every rank read the key heads it holds, in order, so many query heads for each.
    """
    products, firsts = split.get(dim, ()), split.get(first, ())
    if not products or not firsts:
        return not products and not firsts
    copies = product(call.sizes[part] for part in dim.parts[1:])
    (left, *more), (right, *others) = products, firsts
    alike = left.parts // left.every == right.parts // right.every or left.parts == right.parts
    return not more and not others and alike and left.local == right.local * copies


def _is_part(dim: Dim, split: Mapping[Dim, Spans]) -> bool:
    """True for the first part of a product that is sharded with it."""
    return any(isinstance(other, Compound) and dim == other.parts[0] for other in split)


def _of_last_factor(call: Named, split: Mapping[Dim, Spans]) -> dict[Dim, Spans]:
    """The sharded dimensions that the last factor alone has, apart from those of the batch."""
    *others, last = [operand for operand in call.operands if operand.is_factor]
    shared = {name for operand in others for name in operand.dims}
    return {name: split[name] for name in last.dims if name in split and name not in shared and not str(name).startswith(".")}


def _placed(dims: tuple[Dim, ...], split: Mapping[Dim, Spans]) -> Placed:
    return sharded(*((dim, split[name]) for dim, name in enumerate(dims) if name in split))
