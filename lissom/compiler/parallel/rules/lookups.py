"""Placement rules of operators that look up indices; see `table.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.dimension_map import dim_of, shape_of
from lissom.compiler.ir.match import lookup_indices
from lissom.compiler.ir.placement import Spans, sharded
from lissom.compiler.ir.types import Size
from lissom.compiler.parallel.rules.base import Outcome, Reading, alike, moved, replicated


def index_select(node: fx.Node, read: Reading) -> Outcome:
    """Looks up indices of a dimension that is not sharded."""
    x, _, chosen = cast("tuple[fx.Node, int, fx.Node]", node.args[:3])
    rank = len(shape_of(x))
    dim = dim_of(node, rank)
    return _looked_up(node, read, {at: at for at in range(rank) if at != dim}, [chosen])


def index(node: fx.Node, read: Reading) -> Outcome:
    """`x[i, j]`: the dimensions that are not indexed may be sharded, when the indexed ones are neighbours."""
    x = cast(fx.Node, node.args[0])
    indices = cast("list[fx.Node | None]", node.args[1])
    used = [dim for dim, tensor in enumerate(indices) if tensor is not None]
    chosen = [tensor for tensor in indices if tensor is not None]
    shape, rank = shape_of(x), max(len(shape_of(tensor)) for tensor in chosen)
    if len(used) == 1 and _is_behind_parts(read.of(x).spans(used[0]), read.constant(chosen[0])):
        kept = sharded(*((dim, spans) for dim, spans in read.of(x).dims if dim != used[0]))
        return Outcome(kept) if kept.is_replicated else replicated(node, read)
    plain = all(nodes.tensor_type(tensor).dtype != torch.bool for tensor in chosen)
    together = used == list(range(used[0], used[-1] + 1)) and len(shape_of(node)) == len(shape) - len(used) + rank
    places: dict[int, int] = {}
    if plain and together:
        places = {dim: dim if dim < used[0] else dim - len(used) + rank for dim in range(len(shape)) if dim not in used}
    return _looked_up(node, read, places, chosen)


def _is_behind_parts(spans: Spans, indices: torch.Tensor | None) -> bool:
    """True for negative indices that stay within the last, replicated part of a dimension, such as Falcon's one key head."""
    if not spans or indices is None or indices.dtype == torch.bool or not indices.numel():
        return False
    whole: Size = 0
    for span in reversed(spans):
        if span.parts > 1:
            break
        whole = whole + span.whole
    return isinstance(whole, int) and int(indices.max()) < 0 and -int(indices.min()) <= whole


def _looked_up(node: fx.Node, read: Reading, places: dict[int, int], chosen: Sequence[fx.Node]) -> Outcome:
    whole = all(read.of(indices).is_replicated for indices in chosen)
    return moved(node, read, places) if whole else replicated(node, read)


def gather(node: fx.Node, read: Reading) -> Outcome:
    """Looks up indices of a dimension that is not sharded; values and indices are sharded alike in the others."""
    x, chosen = cast(fx.Node, node.args[0]), lookup_indices(node)
    if nodes.argument(node, "dim") is None or len(shape_of(x)) != len(shape_of(chosen)):
        return replicated(node, read)
    dim = dim_of(node, len(shape_of(x)))
    alike_here = all(a == b for at, (a, b) in enumerate(zip(shape_of(x), shape_of(chosen), strict=True)) if at != dim)
    return alike(node, read, whole=[dim]) if alike_here else replicated(node, read)
