"""Keys of the KV cache, and the queries that meet them, in another basis.

    q · k = (q H) · (k H)

Where nothing but views lies between the projections and the scores, H is folded into the projections' weights. Rotary
embeddings and norms of queries and keys have an angle or a scale of their own for each feature, so H is applied after them, to
the tokens of the call only: a key is rotated once, when it is written.

A balanced basis A need not be orthogonal, and μ is subtracted, the mean key of the calibration data by attention:

    q · k = (q A⁻ᵀ) · ((k - μ) A) + q · μ

q · μ is the same for all keys of a query, so the softmax does not change. Where the scores have a soft cap, or sinks, μ is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from lissom.compiler.analysis.axes.axes import axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.structure.kv_cache import cache_writes, readers_of_keys
from lissom.compiler.analysis.structure.operands import sinks_of, softcap_of
from lissom.compiler.calibration.attention_weights import rows_on_data
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.view_calls import IndexCopy
from lissom.errors import RequirementError
from lissom.ops import change_basis, change_basis_reference
from lissom.passes.quantize.rotate.bases import balanced
from lissom.passes.quantize.rotate.channels import rename_state, rotation_obstacle, turn

aten = torch.ops.aten


@dataclass(frozen=True)
class KeyCache:
    """The write of new keys to a cache, with the attentions that read it."""

    new: IndexCopy
    attentions: tuple[Attention, ...]

    @property
    def size(self) -> int:
        """The size of a head."""
        return nodes.fixed_size(self.new.node, -1)

    @property
    def is_shift_invariant(self) -> bool:
        """True when adding a number to all scores of a query changes nothing."""
        return not any(softcap_of(reader.node) or sinks_of(reader.node) is not None for reader in self.attentions)


@dataclass
class KeyMoments:
    """Sums over calibration data, for each key head. A key counts by the attention that it gets.

    An error in the score of a key changes the output in proportion to its softmax weight.

    Attributes:
        keys: Σ p k kᵀ, [key_heads, head_dim, head_dim], float64.
        queries: Σ q qᵀ of the query heads that share the key head.
        total: Σ p k, [key_heads, head_dim].
        mass: Σ p, [key_heads].
    """

    keys: torch.Tensor
    queries: torch.Tensor
    total: torch.Tensor
    mass: torch.Tensor

    @staticmethod
    def empty(heads: int, size: int) -> KeyMoments:
        shapes = ((heads, size, size), (heads, size, size), (heads, size), (heads,))
        return KeyMoments(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> None:
        """Add one text.

        Args:
            queries: [heads, queries, head_dim].
            keys: [heads or key_heads, keys, head_dim].
            weights: softmax weights, [heads, queries, keys].
        """
        groups = (len(self.keys), -1)
        keys = keys.double().cpu().unflatten(0, groups)[:, 0]
        queries = queries.double().cpu().unflatten(0, groups).flatten(1, 2)
        mass = weights.double().cpu().sum(1).unflatten(0, groups).sum(1)
        self.keys += (keys * mass[..., None]).mT @ keys
        self.queries += queries.mT @ queries
        self.total += (keys * mass[..., None]).sum(1)
        self.mass += mass.sum(1)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean key and the second moment of keys, for each key head."""
        mass = self.mass.clamp_min(torch.finfo(torch.float64).tiny)
        return self.total / mass[:, None], self.keys / mass[:, None, None]


def rotate_keys(edit: Editor, basis_of: Callable[[int], torch.Tensor], *, is_balanced: bool) -> None:
    """Rotate the keys of every KV cache in floating point.

    Args:
        basis_of: an orthogonal matrix of a size, in float64.
        is_balanced: balance keys and queries on the calibration data before that.
    """
    caches = _key_caches(edit)
    if not caches and cache_writes(edit.program):
        edit.note(
            "no keys are rotated: attentions read other values than the KV cache holds, as in latent attention; leave the pass "
            "out for this model"
        )
    elif not caches:
        edit.note("the program has no KV cache in floating point; compile_generation makes one")
    elif is_balanced:
        known = key_moments(edit, caches)
        for cache in caches:
            _rotate_balanced(edit, cache, known[cache.new.source], basis_of(cache.size))
    else:
        _rotate_orthogonal(edit, caches, basis_of)


def _key_caches(edit: Editor) -> list[KeyCache]:
    """The caches of keys that nothing but attentions reads."""
    caches = (KeyCache(new, tuple(readers_of_keys(new.node) or ())) for _, new in cache_writes(edit.program))
    return [cache for cache in caches if cache.attentions]


def _rotate_orthogonal(edit: Editor, caches: Sequence[KeyCache], basis_of: Callable[[int], torch.Tensor]) -> None:
    """Fold a basis into the projections where that is possible; elsewhere one weight has the basis of all caches."""
    known = edit.program.fact(axes)
    folded: dict[Axis, torch.Tensor] = {}
    online: list[KeyCache] = []
    for cache in caches:
        axis = known.axis(cache.new.node, -1)
        if axis not in folded and rotation_obstacle(edit.program, axis) is None:
            folded[axis] = basis_of(cache.size)
        elif axis not in folded:
            online.append(cache)
    turn(edit, folded)
    reads: dict[tuple[int, torch.dtype], fx.Node] = {}
    for cache in online:
        typed = nodes.tensor_type(cache.new.node)
        if (cache.size, typed.dtype) not in reads:
            with edit.before(edit.program.nodes()[0], like=[cache.new.node]):
                read = edit.weight("rotation", basis_of(cache.size).to(typed.dtype).to(typed.device))
            reads[cache.size, typed.dtype] = read
        _rotate_online(edit, cache, reads[cache.size, typed.dtype], reads[cache.size, typed.dtype], None)
    edit.note(f"keys of {len(folded)} layers are rotated by their projections, of {len(online)} when they are written")


def _rotate_balanced(edit: Editor, cache: KeyCache, sums: KeyMoments, basis: torch.Tensor) -> None:
    """Give the keys of one cache the balanced basis of its key heads."""
    typed = nodes.tensor_type(cache.new.node)
    mean, keys = sums.moments()
    mean = mean if cache.is_shift_invariant else torch.zeros_like(mean)
    keys = keys - mean[:, :, None] * mean[:, None]
    pairs = [balanced(key, query, basis) for key, query in zip(keys, sums.queries, strict=True)]
    of_keys, of_queries = (torch.stack(list(part)) for part in zip(*pairs, strict=True))
    shift = (mean[:, None] @ of_keys) if cache.is_shift_invariant else None
    name = str(cache.new.x.target)
    with edit.before(cache.new.node):
        reads = [
            None if part is None else edit.weight(f"{name}_{what}", part.to(typed.dtype).to(typed.device))
            for what, part in (("basis", of_keys), ("query_basis", of_queries), ("shift", shift))
        ]
    assert reads[0] is not None and reads[1] is not None
    _rotate_online(edit, cache, reads[0], reads[1], reads[2])


def _rotate_online(edit: Editor, cache: KeyCache, keys: fx.Node, queries: fx.Node, shift: fx.Node | None) -> None:
    """Change the basis of the rows that are written, of the state, and of the queries of its readers."""
    new = cache.new
    edit.current = new.node
    held = edit.tensor(new.x)
    rotated = change_basis_reference(held, edit.tensor(keys))
    with edit.before(new.node):
        rows = edit.call(change_basis, new.source, keys)
        if shift is not None:
            rows, rotated = edit.call(aten.sub.Tensor, rows, shift), rotated - edit.tensor(shift)
    new.node.replace_input_with(new.source, rows)
    edit.set_weight(new.x, rotated)
    rename_state(edit, new.x)
    for attention in cache.attentions:
        with edit.before(attention.node):
            rotated_queries = edit.call(change_basis, attention.q, queries)
        attention.node.replace_input_with(attention.q, rotated_queries)
    edit.rewritten += 1


def key_moments(edit: Editor, caches: Sequence[KeyCache]) -> Mapping[fx.Node, KeyMoments]:
    """The moments of the keys of each cache and of their queries, by the node of the keys that are written.

    Raises:
        RequirementError: without calibration data.
    """
    if not edit.data:
        raise RequirementError("rotate{basis=balanced} needs calibration data: pass data=, or choose basis=hadamard")
    sums = {cache.new.source: KeyMoments.empty(nodes.fixed_size(cache.new.source, 1), cache.size) for cache in caches}
    known = {attention.node: sums[cache.new.source] for cache in caches for attention in cache.attentions}
    for node, (given, weights, real) in rows_on_data(edit.program, edit.data, known, partial(edit.report, "observe")):
        tokens = slice(None) if real is None else real
        queries, keys = (given[operand][0] for operand in (Attention(node).q, Attention(node).k))
        known[node].add(queries[:, tokens], keys, weights[:, tokens])
    return sums
