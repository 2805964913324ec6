"""The fastest variant of an ONNX model: each rewrite in turn is applied, confirmed, timed, and kept where it is faster.

Block-sparse attention by key blocks and with a dense mask is timed at several lengths, to find the crossover.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import geometric_mean

import sympy
import torch

from lissom.backends.base import Executable, restored_state
from lissom.backends.onnx.sparse_attention import ungathered
from lissom.backends.onnx.variants import ATTENTION, CHOICES, PAIRS
from lissom.backends.onnxruntime.opening import Opener, Start, root_reason
from lissom.backends.onnxruntime.session import Session
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import BlockSparseAttention
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample, smallest_samples
from lissom.compiler.ir.signature import evaluate
from lissom.measure.timing import ENOUGH, time_calls, time_once, time_runs
from lissom.ops import block_sparse_attention

_GAIN = 0.98
"""A rewrite has to take less than this fraction of the time without it, so that noise does not decide."""
_RUNS, _FEW_RUNS = 5, 2
"""The least number of timed runs, and that where a call takes longer than the time allowed."""

_SHARES = (1.0, 0.25, 0.5, 2.0)
"""The lengths that are timed, as multiples of the example's, which comes first."""
_AFFORDABLE = 2**30
"""The most bytes of dense scores of one attention; with the softmax, two or three such tensors exist at a time."""


@dataclass
class Search:
    """The fastest variant so far: its session, its rewrites, and sentences on what was tried.

    Attributes:
        seconds: how long each variant is timed, on each sample.
    """

    opener: Opener
    start: Start
    example: Sample
    seconds: float
    best: Session
    chosen: list[str]
    notes: list[str]


def fastest_variant(opener: Opener, start: Start, example: Sample, seconds: float) -> Search:
    """Try every rewrite of CHOICES on top of those kept, then block-sparse attention with a mask of all pairs."""
    search = Search(opener, start, example, seconds, start.session, [*start.chosen], start.notes)
    samples, least = _timed_samples(opener.program, example), _RUNS
    if opener.program.nodes(block_sparse_attention) and 0 < seconds < _second_call(search.best, example):
        # Few runs are enough for long calls, and four times the length is not needed.
        samples, least = [example], _FEW_RUNS
    for choice in CHOICES:
        _try_choice(search, choice, samples, least)
    if opener.program.nodes(block_sparse_attention):
        _try_pairs(search)
    return search


def _try_choice(search: Search, choice: str, samples: Sequence[Sample], least: int) -> None:
    model, places = search.opener.write(search.start.exported, [*search.chosen, choice])
    if not places[choice]:
        return
    subject = f"{CHOICES[choice]}, {places[choice]} times,"
    try:
        variant, _ = search.opener.confirmed(model, search.example, search.start.allowed)
    # ONNX Runtime's errors have no common class. Some versions and providers lack an operator; a wrong one is a VerifyError.
    except Exception as error:
        search.notes.append(f"{subject} is not used: {root_reason(error)}")
        return
    faster, times = _compare(variant, search.best, samples, search.seconds, least)
    search.notes.append(f"{subject} {'is used' if faster else 'is not used'}: {times}")
    if faster:
        search.best, search.chosen = variant, [*search.chosen, choice]


def _try_pairs(search: Search) -> None:
    """Compute block-sparse attention with a mask of all pairs where that is faster than by key blocks."""
    opener, exported = search.opener, search.start.exported
    reason, places = ungathered(exported), opener.write(exported, search.chosen)[1][PAIRS]
    if reason is not None:
        search.notes.append(f"block-sparse attention is computed with a mask of all pairs, since {reason}")
    if not places:
        return
    subject = f"block-sparse attention, {places} times,"
    lengths = affordable_lengths(opener.program, search.example)
    if not lengths:
        search.notes.append(f"{subject} is by key blocks: the scores of all pairs take too much memory to be tried")
        return
    try:
        model, _ = opener.write(exported, list({*search.chosen, ATTENTION, PAIRS}))
        variant, _ = opener.confirmed(model, search.example, search.start.allowed)
    # As in `_try_choice`.
    except Exception as error:
        search.notes.append(f"{subject} is by key blocks; with a mask of all pairs it fails here: {root_reason(error)}")
        return
    timed = time_lengths(search.best, variant, lengths, search.seconds)
    faster = timed[0].pairs_ms < _GAIN * timed[0].blocks_ms
    search.notes.append(f"{subject} is {'with a mask of all pairs' if faster else 'by key blocks'}: {tell_lengths(timed)}")
    if faster:
        search.best = variant


def _timed_samples(program: Program, example: Sample) -> list[Sample]:
    """The example, and one with every free size four times as large where the program accepts it.

    For a program with state also the smallest sizes: decode processes one token at a time.
    """
    signature = program.signature
    large = signature.sample_at(example, signature.scaled(example, 4))
    others = [large, *(smallest_samples(signature, example) if program.state else [])]
    samples = [example]
    for sample in filter(None, others) if signature.dimensions else []:
        # Drawn so that the model may refuse it.
        with suppress(RuntimeError, ValueError, IndexError):
            with torch.no_grad(), kept_state(program):
                program.run(sample)
            samples.append(sample)
    return samples


def _second_call(session: Session, sample: Sample) -> float:
    """The time of the second of two calls, in seconds."""
    with restored_state(session):
        session(sample)
        return time_once(partial(session, sample))[0] / 1e3


def _compare(variant: Session, best: Session, samples: Sequence[Sample], seconds: float, least: int) -> tuple[bool, str]:
    """True if `variant` is faster over all samples, and the times in words.

    Compares lower quartiles, which other work on the machine disturbs least.
    """
    ratios: list[float] = []
    told: list[str] = []
    for sample in samples:
        with restored_state(variant, best):
            timings = time_calls({"with": partial(variant, sample), "without": partial(best, sample)}, seconds, least, ENOUGH)
        ratios.append(timings["with"].low_ms / timings["without"].low_ms)
        shapes = ", ".join(str(list(tensor.shape)) for tensor in sample)
        told.append(f"{timings['with']} ms with it and {timings['without']} ms without on inputs {shapes}")
    return geometric_mean(ratios) < _GAIN, "; ".join(told)


@dataclass(frozen=True)
class Timed:
    """The times of a call at a length in tokens."""

    length: int
    blocks_ms: float
    pairs_ms: float


def affordable_lengths(program: Program, example: Sample) -> list[tuple[int, Sample]]:
    """Lengths with inputs at which dense scores fit in memory, the example first; empty when the example's do not."""
    calls = [BlockSparseAttention(node) for node in program.nodes(block_sparse_attention)]
    length, own = nodes.tensor_type(calls[0].q).shape[2], program.signature.sizes_of(example)
    lengths: list[tuple[int, Sample]] = []
    for share in _SHARES if isinstance(length, sympy.Symbol) and length in own else _SHARES[:1]:
        sizes = {symbol: round(size * share) if symbol == length else size for symbol, size in own.items()}
        score_bytes = max(_score_bytes(call, sizes) for call in calls)
        if score_bytes > _AFFORDABLE and share == 1.0:
            return []
        sample = example if share == 1.0 else program.signature.sample_at(example, sizes)
        if sample is not None and score_bytes <= _AFFORDABLE:
            lengths.append((int(evaluate(length, sizes)), sample))
    return lengths


def time_lengths(blocks: Executable, pairs: Executable, lengths: Sequence[tuple[int, Sample]], seconds: float) -> list[Timed]:
    """Both executables timed in turn at each length: the best of the runs within `seconds` each, at least one."""
    timed: list[Timed] = []
    for length, sample in lengths:
        with restored_state(blocks, pairs):
            runs = time_runs({"blocks": partial(blocks, sample), "pairs": partial(pairs, sample)}, seconds)
        timed.append(Timed(length, min(runs["blocks"]), min(runs["pairs"])))
    return timed


def tell_lengths(timed: Sequence[Timed]) -> str:
    """The times in words, and the lengths between which they cross."""
    told = ", ".join(
        f"{timing.blocks_ms:.3g} ms and {timing.pairs_ms:.3g} ms with a mask of all pairs at length {timing.length}"
        for timing in timed
    )
    ordered = sorted(timed, key=lambda timing: timing.length)
    for shorter, longer in pairwise(ordered):
        if shorter.pairs_ms <= shorter.blocks_ms and longer.blocks_ms < longer.pairs_ms:
            return f"{told}; key blocks are faster from between {shorter.length} and {longer.length} on"
    faster = sum(timing.blocks_ms < timing.pairs_ms for timing in timed)
    ends = {0: "; key blocks are slower at each", len(timed): "; key blocks are faster at each"}
    return told + ends.get(faster, "")


def _score_bytes(call: BlockSparseAttention, sizes: dict[sympy.Symbol, int]) -> int:
    q, k = nodes.tensor_type(call.q), nodes.tensor_type(call.k)
    batch, heads, queries, keys = (int(evaluate(size, sizes)) for size in (*q.shape[:3], k.shape[2]))
    return batch * heads * queries * keys * q.dtype.itemsize
