"""Training batches: calibration data in batches of another size, and the part of it that is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch

from lissom.compiler.analysis.structure.real_tokens import real_positions
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.ir.signature import Signature
from lissom.errors import RequirementError

MOST_HELD_OUT = 32
"""Batches held out at most: enough to tell which weights are best."""
MOST_NEXT_TOKENS = 4096
"""Tokens held out at most where next tokens are predicted: each of them has a loss of its own."""


@dataclass(frozen=True)
class Batch:
    """The flat inputs of one step, and its labels if there are any: [rows] or [rows, tokens]."""

    inputs: Sample
    labels: torch.Tensor | None = None


def resized(program: Program, batches: Sequence[Batch], rows: int) -> list[Batch]:
    """The data in batches of `rows`. Rows of batches with equal shapes are joined, in order, so that no padding is added.

    Raises:
        RequirementError: when the program takes no other batch size than that of the data.
    """
    batched = _batched_inputs(program.signature)
    if batched is None:
        raise RequirementError(
            f"the program takes only the batch size of its example inputs, and batch={rows} asks for another; leave batch= out"
        )
    return [batch for group in _groups(batches, batched) for batch in _resized(group, batched, rows)]


def hold_out(
    program: Program, batches: Sequence[Batch], fraction: float, seed: int, name: str, *, next_tokens: bool = False
) -> tuple[list[Batch], list[Batch]]:
    """The batches to train on, and those held out: `fraction` of them, drawn with the seed, from one to `MOST_HELD_OUT`.

    Args:
        next_tokens: whether the program predicts them; then at most `MOST_NEXT_TOKENS` are held out. A single batch is split by
            rows.
        name: of the pass, for the error.

    Raises:
        RequirementError: for less than two rows.
    """
    pool = list(batches)
    if len(pool) == 1 and (batched := _batched_inputs(program.signature)) is not None:
        size = _rows_of(pool[0], batched)
        held = min(max(1, round(size * fraction)), size - 1)
        if size > 1:
            pool = [_rows(pool[0], batched, slice(0, size - held)), _rows(pool[0], batched, slice(size - held, size))]
            return pool[:1], pool[1:]
    if len(pool) < 2:
        raise RequirementError(
            f"{name} has one row of data, and needs at least two, one to train on and one to judge by: pass more data="
        )
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    most = min(MOST_HELD_OUT, len(pool) - 1)
    if next_tokens:
        tokens, _ = amount(program, [pool[at] for at in order[:most]])
        most = min(most, max(1, round(MOST_NEXT_TOKENS / tokens)))
    held = set(order[: min(max(1, round(len(pool) * fraction)), most)])
    return [batch for at, batch in enumerate(pool) if at not in held], [pool[at] for at in sorted(held)]


def amount(program: Program, batches: Sequence[Batch]) -> tuple[float, str]:
    """The mean amount of data of a batch, and its unit: `tokens` that are no padding, or `rows` where tokens are unknown."""
    total = 0
    for batch in batches:
        masks = real_positions(program, batch.inputs)
        first = batch.inputs[0]
        if not masks and (first.is_floating_point() or first.dim() != 2):
            return sum(len(batch.inputs[0]) for batch in batches) / len(batches), "rows"
        total += int(masks[0][2].sum()) if masks else first.numel()
    return total / len(batches), "tokens"


def rows_of_rank(program: Program, batches: Sequence[Batch], rank: int, world_size: int) -> tuple[list[Batch], list[float]]:
    """A rank's rows of each batch, and the fraction of the batch that they are.

    Of a batch with fewer rows than ranks, some ranks have the first row, as a fraction of 0.

    Raises:
        RequirementError: when the program takes no other batch size than that of the data.
    """
    batched = _batched_inputs(program.signature)
    if batched is None:
        raise RequirementError(
            "the program takes only the batch size of its example inputs, so its batches cannot be divided among ranks; train "
            "it in one process"
        )
    own, fractions = list[Batch](), list[float]()
    for batch in batches:
        rows = _rows_of(batch, batched)
        start, end = (rows * at // world_size for at in (rank, rank + 1))
        if start == end:
            start, end = 0, 1
            fractions.append(0.0)
        else:
            fractions.append((end - start) / rows)
        own.append(_rows(batch, batched, slice(start, end)))
    return own, fractions


def _batched_inputs(signature: Signature) -> list[bool] | None:
    """For each input whether its first dimension is the batch; None when no dimension is a batch of any size."""
    first = [leaf.type.shape[0] if leaf.type.shape else 1 for leaf in signature.tensors]
    symbols = [size for size in first if isinstance(size, sympy.Symbol)]
    if not symbols or len(set(symbols)) > 1:
        return None
    return [isinstance(size, sympy.Symbol) for size in first]


def _rows_of(batch: Batch, batched: Sequence[bool]) -> int:
    return next(tensor.shape[0] for tensor, has_rows in zip(batch.inputs, batched, strict=True) if has_rows)


def _rows(batch: Batch, batched: Sequence[bool], chosen: slice) -> Batch:
    inputs = [tensor[chosen] if has_rows else tensor for tensor, has_rows in zip(batch.inputs, batched, strict=True)]
    return Batch(inputs, None if batch.labels is None else batch.labels[chosen])


def _groups(batches: Sequence[Batch], batched: Sequence[bool]) -> list[list[Batch]]:
    """Batches whose rows may be joined: of equal shapes, with equal inputs that have no rows, all with labels or none."""
    groups: dict[object, list[Batch]] = {}
    for batch in batches:
        key: list[object] = [None if batch.labels is None else batch.labels.shape[1:]]
        for tensor, has_rows in zip(batch.inputs, batched, strict=True):
            key.append(tuple(tensor.shape[1:]) if has_rows else tuple(tensor.flatten().tolist()))
        groups.setdefault(tuple(key), []).append(batch)
    return list(groups.values())


def _resized(group: Sequence[Batch], batched: Sequence[bool], rows: int) -> list[Batch]:
    inputs = [
        torch.cat([batch.inputs[at] for batch in group]) if has_rows else group[0].inputs[at]
        for at, has_rows in enumerate(batched)
    ]
    labels = [batch.labels for batch in group if batch.labels is not None]
    whole = Batch(inputs, torch.cat(labels) if labels else None)
    return [_rows(whole, batched, slice(start, start + rows)) for start in range(0, _rows_of(whole, batched), rows)]
