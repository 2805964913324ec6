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
    found = named(node)
    if found is None:
        return replicated(node, read)
    pending = _pending(found)
    split = _split(found, read, pending)
    if split is None:
        return replicated(node, read)
    summed = {name: spans for name, spans in split.items() if name in pending}
    if summed and len(split) > 1:
        # A factor sharded along a dimension of its own, another along the one that is summed: the own one gives way.
        split = summed
    elif pending and len(split) > 1 and (own := _of_last_factor(found, split)):
        # Values sharded by position, a weight sharded by features: the values are gathered.
        split = own
    if not read.fits({dim: spans for dim, spans in split.items() if not _is_part(dim, split)}):
        return replicated(node, read)
    if summed:
        spans = next(iter(summed.values()))
        # The padding of a weight is zero, that of a computed value may be anything.
        of_weight = any(is_weight(item.node) for item in found.operands if item.is_factor)
        if (any(span.is_padded for span in spans) and not of_weight) or not read.is_apart(spans):
            return replicated(node, read)
    wants: dict[fx.Node, Placed] = {}
    for item in found.operands:
        wanted = PARTIAL if summed and item.is_added else _placed(item.dims, split)
        if wants.setdefault(item.node, wanted) != wanted:
            # x · x: one value cannot lie in two ways.
            return replicated(node, read)
    results = [PARTIAL if summed else _placed(dims, split) for dims in found.results]
    return settled(node, read, tuple(results) if len(results) > 1 else results[0], wants)


def _pending(found: Named) -> frozenset[str]:
    """The dimensions whose sum ranks may take by parts: every operand that has one is a factor."""
    return frozenset(found.summed) - {name for item, _, name in found.places() if not item.is_factor}


def _split(found: Named, read: Reading, pending: frozenset[str]) -> dict[Dim, Spans] | None:
    """The sharded dimensions of the operands; None where the operator cannot work on parts of them."""
    kept = found.whole | found.normed | found.fixed | found.bound | found.positions | (frozenset(found.summed) - pending)
    split: dict[Dim, Spans] = {}
    for item in found.operands:
        # What is added or broadcast follows the others.
        for dim, spans in () if item.is_added or item.is_broadcast else read.of(item.node).dims:
            name = item.dims[dim]
            if item.opaque or not name or not kept.isdisjoint(parts_of(name)) or split.setdefault(name, spans) != spans:
                return None
    products = {name for item in found.operands for name in item.dims if isinstance(name, Compound)}
    for name in products:
        first, *rest = name.parts
        alone = any(part in split for part in rest)
        if found.bound.isdisjoint(name.parts) and (alone or not _goes_with(split, name, first, found)):
            return None
    return split


def _goes_with(split: Mapping[Dim, Spans], dim: Compound, first: str, found: Named) -> bool:
    """True when each rank holds the indices of a product that belong to those of its first part that it holds.

    For attention: the query heads of every rank read the key heads it holds, in order, so many query heads for each.
    """
    products, firsts = split.get(dim, ()), split.get(first, ())
    if not products or not firsts:
        return not products and not firsts
    copies = product(found.sizes[part] for part in dim.parts[1:])
    (left, *more), (right, *others) = products, firsts
    alike = left.parts // left.every == right.parts // right.every or left.parts == right.parts
    return not more and not others and alike and left.local == right.local * copies


def _is_part(dim: Dim, split: Mapping[Dim, Spans]) -> bool:
    """True for the first part of a product that is sharded with it."""
    return any(isinstance(other, Compound) and dim == other.parts[0] for other in split)


def _of_last_factor(found: Named, split: Mapping[Dim, Spans]) -> dict[Dim, Spans]:
    """The sharded dimensions that the last factor alone has, apart from those of the batch."""
    *others, last = [item for item in found.operands if item.is_factor]
    shared = {name for item in others for name in item.dims}
    return {name: split[name] for name in last.dims if name in split and name not in shared and not str(name).startswith(".")}


def _placed(dims: tuple[Dim, ...], split: Mapping[Dim, Spans]) -> Placed:
    return sharded(*((dim, split[name]) for dim, name in enumerate(dims) if name in split))
