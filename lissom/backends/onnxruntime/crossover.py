"""Block-sparse attention by key blocks and with a dense mask, timed at several lengths to find the crossover."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import sympy

from lissom.backends.base import Executable, restored_state
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample, resize
from lissom.compiler.ir.signature import evaluate
from lissom.errors import InputError
from lissom.ops import block_sparse_attention

_SHARES = (1.0, 0.25, 0.5, 2.0)
"""The lengths that are timed, as multiples of the example's, which comes first."""
_AFFORDABLE = 2**30
"""The most bytes of dense scores of one attention; with the softmax, two or three such tensors exist at a time."""


@dataclass(frozen=True)
class Timed:
    """The times of a call at a length in tokens."""

    length: int
    blocks_ms: float
    pairs_ms: float


def affordable_lengths(program: Program, example: Sample) -> list[tuple[int, Sample]]:
    """Lengths with inputs at which dense scores fit in memory, the example first; empty when the example's do not."""
    signature = program.signature
    calls = program.nodes(block_sparse_attention)
    own = signature.sizes_of(example)
    length = nodes.tensor_type(calls[0].args[0]).shape[2]
    found: list[tuple[int, Sample]] = []
    for share in _SHARES if isinstance(length, sympy.Symbol) and length in own else _SHARES[:1]:
        sizes = {symbol: round(size * share) if symbol == length else size for symbol, size in own.items()}
        taken = max(_score_bytes(call.args, sizes) for call in calls)
        if taken > _AFFORDABLE and share == 1.0:
            return []
        sample = example if share == 1.0 else resize(signature, example, sizes)
        with suppress(InputError):
            signature.check_sizes(sample)
            if taken <= _AFFORDABLE:
                found.append((int(evaluate(length, sizes)), sample))
    return found


def time_lengths(blocks: Executable, pairs: Executable, lengths: Sequence[tuple[int, Sample]], seconds: float) -> list[Timed]:
    """Both executables timed in turn at each length: the best of the runs within `seconds` each, at least one."""
    found: list[Timed] = []
    for length, sample in lengths:
        with restored_state(blocks, pairs):
            best = [float("inf")] * 2
            started = time.perf_counter()
            while best[0] == float("inf") or time.perf_counter() - started < 2 * seconds:
                best = [min(old, _once(partial(one, sample))) for old, one in zip(best, (blocks, pairs), strict=True)]
        found.append(Timed(length, *best))
    return found


def tell_lengths(found: Sequence[Timed]) -> str:
    """The times in words, and the lengths between which they cross."""
    told = ", ".join(
        f"{item.blocks_ms:.3g} ms and {item.pairs_ms:.3g} ms with a mask of all pairs at length {item.length}" for item in found
    )
    ordered = sorted(found, key=lambda item: item.length)
    for shorter, longer in pairwise(ordered):
        if shorter.pairs_ms <= shorter.blocks_ms and longer.blocks_ms < longer.pairs_ms:
            return f"{told}; key blocks are faster from between {shorter.length} and {longer.length} on"
    faster = sum(item.blocks_ms < item.pairs_ms for item in found)
    ends = {0: "; key blocks are slower at each", len(found): "; key blocks are faster at each"}
    return told + ends.get(faster, "")


def _score_bytes(operands: Sequence[object], sizes: dict[sympy.Symbol, int]) -> int:
    q, k = (nodes.tensor_type(item) for item in operands[:2])  # pyright: ignore[reportArgumentType]
    batch, heads, queries, keys = (int(evaluate(size, sizes)) for size in (*q.shape[:3], k.shape[2]))
    return batch * heads * queries * keys * q.dtype.itemsize


def _once(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3
