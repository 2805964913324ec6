"""Keep one key/value head of each group of equal ones; the query heads of the group share it.

Neighbouring heads are equal where their rows of the key and value projections are equal, bit for bit:

    k₁ = k₂ and v₁ = v₂   ->   softmax(q₁ k₁ᵀ) v₁,  softmax(q₂ k₁ᵀ) v₁

Multi-head attention becomes grouped-query attention, or multi-query attention where all heads are equal, and grouped-query
attention gets fewer groups. The other heads are removed from projections, biases, norms and the KV cache, so that the cache
takes less memory, and less of it is read per token. `pool-heads` makes heads equal.

Shazeer 2019, Fast Transformer Decoding: One Write-Head is All You Need, §3; Ainslie et al. 2023, GQA, §2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.compiler.transforms.heads.key_value_heads import SeparateHeads, Separation, separated_heads
from lissom.compiler.transforms.removal.indices import remove_indices
from lissom.errors import UnsupportedError


@dataclass(frozen=True)
class MergeEqualHeads(Rewrite):
    """Keeps one key/value head of each group of equal neighbours."""

    def run(self, edit: Editor) -> None:
        state = _state_bytes(edit.program)
        with separated_heads(edit) as separation:
            sets = [(together, gone) for together in joined(separation.heads) if (gone := _gone(edit, separation, together))]
            try:
                _merge(edit, separation, sets)
            except UnsupportedError:
                for together, gone in sets:
                    try:
                        _merge(edit, separation, [(together, gone)])
                    except UnsupportedError as error:
                        edit.skip(together[0].site.node, f"equal heads stay: {error}")
        if _state_bytes(edit.program) < state:
            edit.note(f"the cache takes {_state_bytes(edit.program) / 1e6:.3g} MB, and took {state / 1e6:.3g} MB")


def joined(attentions: Sequence[SeparateHeads]) -> list[list[SeparateHeads]]:
    """The attentions grouped into sets; no two sets have key or value heads in common."""
    groups: list[list[SeparateHeads]] = []
    for heads in attentions:
        touching = [group for group in groups if any(set(heads.shared) & set(member.shared) for member in group)]
        groups = [group for group in groups if group not in touching] + [
            [*(each for group in touching for each in group), heads]
        ]
    return groups


def _gone(edit: Editor, separation: Separation, together: Sequence[SeparateHeads]) -> list[int]:
    """The heads that equal one before them, in attentions that have heads in common."""
    shared = {axis: None for heads in together for axis in heads.shared}
    size = largest_group([rows.read(edit.program) for axis in shared for rows in separation.rows(axis)], together[0].count)
    return [head for head in range(together[0].count) if head % size]


def _merge(edit: Editor, separation: Separation, sets: Sequence[tuple[Sequence[SeparateHeads], list[int]]]) -> None:
    """Remove these heads, and let the query heads share the remaining ones.

    Raises:
        UnsupportedError: with the obstacle; the program is unchanged then.
    """
    removed = {axis: gone for together, gone in sets for heads in together for axis in heads.shared}
    if removed:
        remove_indices(edit, removed, separation.axes)
    for heads in [heads for together, _ in sets for heads in together]:
        separation.share(heads)


def largest_group(held: Sequence[torch.Tensor], heads: int) -> int:
    """The largest group size for which all heads of every group of neighbours are equal, bit for bit; 1 where none are.

    Args:
        held: for each dimension of a weight with the heads, the elements of every head, [heads, …].
    """
    for size in range(heads, 1, -1):
        if heads % size == 0:
            grouped = [rows.unflatten(0, (-1, size)) for rows in held]
            if all(bool((rows == rows[:, :1]).all()) for rows in grouped):
                return size
    return 1


def _state_bytes(program: Program) -> int:
    return sum(program.weight(name).nbytes for name in program.state)
