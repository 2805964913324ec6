"""Batches of rows of similar length, without the padding that such rows do not need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import sympy
import torch

from lissom.compiler.analysis.structure.real_tokens import real_positions
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.training.batches import Batch
from lissom.compiler.training.losses import IGNORED
from lissom.errors import InputError

_LENGTHS = 16
"""The most lengths of batches. On a CPU PyTorch keeps up to 1,024 products in bfloat16 compiled, one for each shape: of MiniLM
with fewer neurons 39 a length, which take 18 MiB. With 16 lengths in place of 47 its peak was 170 MiB lower. Its texts of 5 to
92 tokens got 4 % of padding, and as many of them were trained on in a second, within 2 %."""


@dataclass(frozen=True)
class Buckets:
    """Batches by length, and the fraction of their tokens that are padding, before and after."""

    batches: list[Batch]
    padding_before: float
    padding_after: float


@dataclass(frozen=True)
class _Row:
    """A row of the data, with the batch dimension kept.

    Attributes:
        inputs: those with a batch dimension, whole.
        length: of its tokens up to the last that is no padding.
    """

    inputs: Sample
    label: torch.Tensor | None
    length: int
    padded: int
    real: int


def by_length(program: Program, batches: Sequence[Batch], rows: int | None) -> Buckets | None:
    """The rows of all batches sorted by length, in batches of `rows`, each as long as its longest row or a little longer.

    Padding at the end of rows is cut, and added where a row is shorter than its batch, with the values that padding has in the
    data.

    Returns None where this cannot be done or gains nothing: inputs without a batch, a length that is fixed or of two
    dimensions, no padding at the end of rows, padding of many values.

    Args:
        rows: of a batch; None takes those of the first batch.
    """
    tokens = _length_of(program, batches)
    if tokens is None:
        return None
    places = [leaf.type.shape.index(tokens) if tokens in leaf.type.shape else None for leaf in program.signature.tensors]
    lines = [row for batch in batches for row in _rows(program, batch, tokens)]
    fill = [_padding_value(lines, at, place) for at, place in enumerate(places)]
    if any(place is not None and value is None for place, value in zip(places, fill, strict=True)):
        return None
    lines.sort(key=attrgetter("length"))
    shortest = program.signature.dimensions[tokens].minimum
    buckets, after = list[Batch](), 0
    size = rows or len(batches[0].inputs[0])
    groups = [lines[start : start + size] for start in range(0, len(lines), size)]
    longest = [max(chosen[-1].length, shortest) for chosen in groups]
    for chosen, length in zip(groups, _few(longest), strict=True):
        parts = [[_fitted(row.inputs[at], place, length, fill[at]) for row in chosen] for at, place in enumerate(places)]
        labels = [
            _fitted(label, 1 if label.dim() > 1 else None, length, IGNORED)
            for row in chosen
            if (label := row.label) is not None
        ]
        buckets.append(Batch([torch.cat(part) for part in parts], torch.cat(labels) if labels else None))
        after += length * len(chosen)
    before, real = sum(row.padded for row in lines), sum(row.real for row in lines)
    if len(buckets) == 1 or after >= before or not all(_allowed(program, batch) for batch in buckets):
        return None
    return Buckets(buckets, 1 - real / before, 1 - real / after)


def _few(lengths: Sequence[int]) -> list[int]:
    """At most `_LENGTHS` different ones, each the length itself or longer, by what adds the fewest tokens each time."""
    wanted = torch.tensor(lengths)
    known, counts = wanted.unique(return_counts=True)
    while len(known) > _LENGTHS:
        cheapest = int((counts[:-1] * known.diff()).argmin())
        counts[cheapest + 1] += counts[cheapest]
        others = torch.arange(len(known)) != cheapest
        known, counts = known[others], counts[others]
    return known[torch.searchsorted(known, wanted)].tolist()


def _length_of(program: Program, batches: Sequence[Batch]) -> sympy.Symbol | None:
    """The dimension of the tokens: the only one that varies besides the batch, which is the first one of each input."""
    shapes = [leaf.type.shape for leaf in program.signature.tensors]
    masks = real_positions(program, batches[0].inputs)
    rows, tokens = masks[0][:2] if masks else (None, None)
    if not isinstance(tokens, sympy.Symbol) or rows == tokens:
        return None
    for shape in shapes:
        if not shape or shape[0] != rows or [size for size in shape[1:] if not isinstance(size, int)] not in ([], [tokens]):
            return None
    return tokens if all(_has_fitting_labels(batch, batches[0]) for batch in batches) else None


def _has_fitting_labels(batch: Batch, first: Batch) -> bool:
    """True if the batch has labels of the same form as the first one: none, one per row, or a class per token."""
    if batch.labels is None or first.labels is None:
        return batch.labels is first.labels
    return batch.labels.dim() == first.labels.dim() and (batch.labels.dim() == 1 or not batch.labels.is_floating_point())


def _rows(program: Program, batch: Batch, tokens: sympy.Symbol) -> Iterator[_Row]:
    """The rows of a batch. Without padding every row is as long as the batch."""
    real = next(mask for _, size, mask in real_positions(program, batch.inputs) if size == tokens)
    counts = torch.arange(1, real.shape[1] + 1, device=real.device)
    for at, (length, count) in enumerate(zip((real * counts).amax(1).tolist(), real.sum(1).tolist(), strict=True)):
        row = slice(at, at + 1)
        label = None if batch.labels is None else batch.labels[row]
        yield _Row([tensor[row] for tensor in batch.inputs], label, length, real.shape[1], count)


def _padding_value(rows: Sequence[_Row], at: int, place: int | None) -> float | None:
    """The one value of an input after the last real token of rows; None when there is none, or when it has many."""
    if place is None:
        return None
    parts = (row.inputs[at].narrow(place, row.length, row.padded - row.length) for row in rows if row.length < row.padded)
    values = {float(value) for part in parts for value in part.unique()}
    return values.pop() if len(values) == 1 else None


def _fitted(tensor: torch.Tensor, place: int | None, length: int, fill: float | None) -> torch.Tensor:
    """The tensor cut or filled up to a length along `place`; as it is without such a dimension."""
    if place is None or tensor.dim() <= place:
        return tensor
    missing = length - tensor.shape[place]
    if missing <= 0:
        return tensor.narrow(place, 0, length)
    shape = list(tensor.shape)
    shape[place] = missing
    return torch.cat([tensor, tensor.new_full(shape, fill or 0)], place)


def _allowed(program: Program, batch: Batch) -> bool:
    """True if the sizes are in the program's ranges and keep its conditions, such as a length divisible by eight."""
    try:
        program.signature.check_sizes(batch.inputs)
    except InputError:
        return False
    return True
