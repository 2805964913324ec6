"""Verification inputs: the caller's example, and valid variants of it with other sizes, values and masks; and parts of data.

docs/verification.md says what each is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

import torch

from lissom.compiler.ir.signature import Signature, Sizes
from lissom.errors import InputError

Sample = list[torch.Tensor]
Pattern = Callable[[int, int], torch.Tensor]
"""From the rows and columns of a mask, the places to mask: [rows, columns] of booleans."""

LONGEST = 513
"""The longest length tried: one more than the window lengths of small models, which are powers of two."""
WORK = 2e9
"""The floating-point operations allowed in a run at the longest length, some tenths of a second on one core."""
LARGE_WORK = 20_000_000_000
"""The floating-point operations allowed in a run at the larger sizes for timing, some tenths of a second on two cores.

An example that takes more is checked on fewer of its rows.
"""
_MASKED = -1e4
"""The masking value for an additive mask of zeros only; in the range of fp16."""
_LOW = -1e3
"""A floating-point input with only zeros and values of at most this is taken for an additive mask."""


def spread(data: Sequence[Sample], tokens: int) -> Sequence[Sample]:
    """Evenly spaced samples of the data with about that many tokens together; all samples when they have fewer."""
    held = sum(max(tensor.shape[:2].numel() for tensor in sample) for sample in data)
    wanted = min(len(data), max(1, round(len(data) * tokens / max(held, 1))))
    return data if wanted == len(data) else [data[index * len(data) // wanted] for index in range(wanted)]


def check_samples(signature: Signature, example: Sequence[torch.Tensor]) -> list[Sample]:
    """The verification inputs of every exact pass: the example, and a variant with other sizes, values and masks."""
    variant = _masked(_variant(signature, example), _tail_and_hole)
    return [list(example)] if _same(variant, example) else [list(example), variant]


def few_rows(signature: Signature, example: Sequence[torch.Tensor], flops: int) -> Sample:
    """The example, or so few of its rows that a run takes `LARGE_WORK`: a row more costs time, and shows no other fault.

    Args:
        flops: of a run on the example.
    """
    batch = signature.batch
    if batch is None or flops <= LARGE_WORK:
        return list(example)
    sizes = signature.sizes_of(example)
    rows = max(signature.dimensions[batch].minimum, int(sizes[batch] * LARGE_WORK / flops))
    fewer = signature.thinned(example, sizes | {batch: min(rows, sizes[batch])})
    try:
        signature.check_sizes(fewer)
    except InputError:  # the rows are bound to another size
        return list(example)
    return fewer


def more_samples(signature: Signature, example: Sequence[torch.Tensor], flops: int) -> list[Sample]:
    """Further verification inputs for a sequence of exact passes, from before the first to after the last.

    Args:
        flops: of a run on the example.
    """
    plain = _variant(signature, example, seed=1)
    starts = _masked(plain, _start, low=-float("inf"))
    samples = [
        _masked(starts, _start, kind=0),
        _masked(_masked(plain, _whole_row), _whole_row, kind=0),
        _masked(list(map(_ids_redrawn, plain)), _tail_and_hole, kind=0),
    ]
    samples = [sample for sample in samples if not _same(sample, plain)]
    for seed, tried in enumerate((_several_times(signature, example, flops), _longest(signature, example, flops)), 2):
        sample = _first_allowed(signature, example, tried, seed)
        if sample is not None:
            samples.append(_masked(_redrawn(sample, seed), _tail_and_hole))
    return samples


def varied_samples(example: Sequence[torch.Tensor]) -> list[Sample]:
    """The example's sizes with other values, and with every form of padding in its masks of either polarity."""
    plain = _redrawn(list(map(_ids_redrawn, example)), 4)
    masked = [_masked(plain, form, kind) for kind in (1, 0) for form in (_tail, _tail_and_hole, _start, _whole_row)]
    return [plain, *(sample for sample in masked if not _same(sample, plain))]


def smaller_samples(signature: Signature, example: Sequence[torch.Tensor], sample: Sample) -> Iterator[Sample]:
    """Instead of a sample that the model refuses: its rows and positions thinned out to smaller sizes.

    First the example's lengths, then all its sizes, then half of them.
    """
    given, usual, halves = signature.sizes_of(sample), signature.sizes_of(example), other_sizes(signature, example)[-1]
    tried = list[Sizes]()
    for sizes in (given | {symbol: usual[symbol] for symbol in signature.lengths}, usual, halves):
        if sizes != given and sizes not in tried:
            tried.append(sizes)
            smaller = signature.thinned(sample, sizes)
            with suppress(InputError):
                signature.check_sizes(smaller)
                yield smaller


def larger(signature: Signature, example: Sequence[torch.Tensor], flops: int) -> Iterator[Sample]:
    """The example with all dynamic dimensions 16, 8, 4 and 2 times as large, for timing, where that does not take too long.

    Args:
        flops: of a run on the example.
    """
    usual = signature.sizes_of(example)
    for factor in (16, 8, 4, 2):
        sizes = signature.scaled(example, factor)
        if flops * math.prod(sizes[symbol] / size for symbol, size in usual.items()) <= LARGE_WORK:
            sample = _first_allowed(signature, example, [sizes])
            if sample is not None:
                yield sample


def smallest_samples(signature: Signature, example: Sequence[torch.Tensor]) -> list[Sample]:
    """The example at the smallest sizes of the signature, where compilers tend to fail; none when it refuses them."""
    sample = signature.sample_at(example, {symbol: dimension.minimum for symbol, dimension in signature.dimensions.items()})
    return [] if sample is None else [sample]


def other_sizes(signature: Signature, example: Sequence[torch.Tensor]) -> tuple[Sizes, Sizes, Sizes]:
    """The example's sizes each a little larger, twice as large, and half as large, at least the smallest allowed."""
    sizes = signature.sizes_of(example)
    return (
        {symbol: size + 1 + index for index, (symbol, size) in enumerate(sizes.items())},
        {symbol: size * 2 for symbol, size in sizes.items()},
        {symbol: max(signature.dimensions[symbol].minimum, size // 2) for symbol, size in sizes.items()},
    )


def _variant(signature: Signature, example: Sequence[torch.Tensor], seed: int = 0) -> Sample:
    """The example at other sizes, if some are dynamic, with other floating-point values in every row."""
    return _redrawn(_first_allowed(signature, example, other_sizes(signature, example), seed) or list(example), seed)


def _several_times(signature: Signature, example: Sequence[torch.Tensor], flops: int) -> list[Sizes]:
    """Four times the example's length, or fewer, at most what the signature accepts; as many rows, within `LARGE_WORK`."""
    allowed = LARGE_WORK / max(flops, 1) if signature.lengths == [signature.batch] else math.inf
    scaled = [signature.scaled(example, factor) for factor in (4, 3, 2) if factor <= allowed]
    return [{symbol: sizes[symbol] for symbol in signature.lengths} for sizes in scaled]


def _longest(signature: Signature, example: Sequence[torch.Tensor], flops: int) -> list[Sizes]:
    """One row of the largest length within `WORK`, or of a rounder one; empty when it is at most four times the example's."""
    sizes, lengths = signature.sizes_of(example), signature.lengths
    if not lengths:
        return []
    short = {symbol: signature.dimensions[symbol].minimum for symbol in sizes}
    work = max(flops, 1) * math.prod(short[symbol] / size for symbol, size in sizes.items() if symbol not in lengths)
    longest = max(sizes[symbol] for symbol in lengths)
    length = min(LONGEST, int(longest * WORK / work))
    if length <= 4 * longest:
        return []
    rounded = dict.fromkeys(length // step * step for step in (1, 2, 8, 64))
    return [short | {symbol: signature.dimensions[symbol].at_most(number) for symbol in lengths} for number in rounded]


def _first_allowed(
    signature: Signature, example: Sequence[torch.Tensor], tried: Iterable[Sizes], seed: int = 0
) -> Sample | None:
    """The example at the first of these sizes that the signature accepts and that differ from its own."""
    usual = signature.sizes_of(example)
    others = (signature.sample_at(example, sizes, seed) for sizes in tried if {**usual, **sizes} != usual)
    return next((sample for sample in others if sample is not None), None)


def _redrawn(sample: Sample, seed: int) -> Sample:
    """The sample with each floating-point value scaled by a random factor in (0.5, 1], so that no two rows are equal."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        # There is no arithmetic on 8-bit floats.
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1 or _mask_values(tensor) is not None:
            return tensor
        factors = 1 - torch.rand(tensor.shape, generator=generator) / 2
        return tensor * factors.to(tensor.device, tensor.dtype)

    return list(map(draw, sample))


def _ids_redrawn(tensor: torch.Tensor) -> torch.Tensor:
    """Random integers between the smallest and the largest, unless the tensor is a mask, counts up, or holds sorted offsets."""
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.numel() < 2:
        return tensor
    if _mask_values(tensor) is not None or bool((tensor.diff(dim=-1) >= 0).all()):
        return tensor
    low, high = int(tensor.min()), int(tensor.max())
    drawn = torch.randint(low, high + 1, tensor.shape, generator=torch.Generator().manual_seed(low), dtype=tensor.dtype)
    return drawn.to(tensor.device)


def _masked(sample: Sample, pattern: Pattern, kind: int = 1, low: float | None = None) -> Sample:
    """The sample with the pattern's places masked in its masks.

    Args:
        kind: 1 for masks whose usual value is one, true, or an additive zero; 0 for masks whose usual value is zero or false.
        low: the masking value for an additive mask of zeros only.
    """

    def hide(tensor: torch.Tensor) -> torch.Tensor:
        usual, hidden = _mask_values(tensor) or (None, 0.0)
        if usual != kind:
            return tensor
        hidden = low if low is not None and hidden == _MASKED else hidden
        rows, columns = tensor.shape[0], tensor.shape[-1]
        places = pattern(rows, columns).reshape(rows, *[1] * (tensor.dim() - 2), columns)
        if tensor.shape[-2] == columns and tensor.dim() > 2:
            places = places & ~torch.eye(columns, dtype=torch.bool)  # every query sees its own key
        return tensor.masked_fill(places.to(tensor.device), hidden)

    return list(map(hide, sample))


def _mask_values(tensor: torch.Tensor) -> tuple[int, float] | None:
    """The kind, see `_masked`, and the masking value of a mask or of token type ids; None for any other input."""
    if tensor.dim() < 2 or tensor.shape[-1] < 2 or tensor.numel() == 0 or tensor.is_complex():
        return None
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        return None
    zeros = tensor == 0
    if tensor.is_floating_point() and bool((zeros | (tensor <= _LOW)).all()):
        if not zeros.all():
            return 1, float(tensor.min())
        if tensor.dim() == 4 and tensor.shape[1] == 1:  # one for all heads
            return 1, _MASKED
    if not (zeros | (tensor == 1)).all():
        return None
    usual = int(2 * int(zeros.sum()) <= tensor.numel())
    return usual, 1 - usual


def _tail_and_hole(rows: int, columns: int) -> torch.Tensor:
    """Padding at the end of the last row, and a hole in the first."""
    places = torch.zeros(rows, columns, dtype=torch.bool)
    places[-1, columns // 2 + 1 :] = True
    places[0, 1] = columns > 2
    return places


def _tail(rows: int, columns: int) -> torch.Tensor:
    """Padding at the end of the last row alone."""
    places = torch.zeros(rows, columns, dtype=torch.bool)
    places[-1, columns // 2 + 1 :] = True
    return places


def _start(rows: int, columns: int) -> torch.Tensor:
    """Padding at the first places of the first row."""
    return _first_row(rows, columns, max(columns // 3, 1))


def _whole_row(rows: int, columns: int) -> torch.Tensor:
    """A first row of padding only, when there are others."""
    return _first_row(rows, columns, columns if rows > 1 else 0)


def _first_row(rows: int, columns: int, count: int) -> torch.Tensor:
    places = torch.zeros(rows, columns, dtype=torch.bool)
    places[0, :count] = True
    return places


def _same(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(left, right, strict=True))
