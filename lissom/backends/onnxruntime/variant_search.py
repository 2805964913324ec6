"""The fastest variant of an ONNX model: each rewrite in turn is applied, confirmed, timed, and kept where it is faster."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean

import torch

from lissom.backends.base import restored_state, smallest_samples
from lissom.backends.onnx.sparse_attention import ungathered
from lissom.backends.onnx.variants import ATTENTION, CHOICES, PAIRS
from lissom.backends.onnxruntime.crossover import affordable_lengths, tell_lengths, time_lengths
from lissom.backends.onnxruntime.opening import Opener, Start, root_reason
from lissom.backends.onnxruntime.session import Session
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample, resize
from lissom.errors import InputError
from lissom.inspect.timing import ENOUGH, time_calls
from lissom.ops import block_sparse_attention

_GAIN = 0.98
"""A rewrite has to take less than this fraction of the time without it, so that noise does not decide."""
_RUNS, _FEW_RUNS = 5, 2
"""The least number of timed runs, and that where a call takes longer than the time allowed."""


@dataclass
class Search:
    """The fastest variant so far: its session, its rewrites, and sentences on what was tried.

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
        other, _ = search.opener.confirmed(model, search.example, search.start.allowed)
    # ONNX Runtime's errors have no common class. Some versions and providers lack an operator; a wrong one is a VerifyError.
    except Exception as error:
        search.notes.append(f"{subject} is not used: {root_reason(error)}")
        return
    faster, times = _compare(other, search.best, samples, search.seconds, least)
    search.notes.append(f"{subject} {'is used' if faster else 'is not used'}: {times}")
    if faster:
        search.best, search.chosen = other, [*search.chosen, choice]


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
        other, _ = opener.confirmed(model, search.example, search.start.allowed)
    # As in `_try_choice`.
    except Exception as error:
        search.notes.append(f"{subject} is by key blocks; with a mask of all pairs it fails here: {root_reason(error)}")
        return
    found = time_lengths(search.best, other, lengths, search.seconds)
    faster = found[0].pairs_ms < _GAIN * found[0].blocks_ms
    search.notes.append(f"{subject} is {'with a mask of all pairs' if faster else 'by key blocks'}: {tell_lengths(found)}")
    if faster:
        search.best = other


def _timed_samples(program: Program, example: Sample) -> list[Sample]:
    """The example, and one with every free size four times as large where the program accepts it.

    For a program with state also the smallest sizes: decode processes one token at a time.
    """
    signature = program.signature
    sizes = {
        symbol: min(4 * size, signature.dimensions[symbol].maximum or 4 * size)
        for symbol, size in signature.sizes_of(example).items()
    }
    others = [resize(signature, example, sizes), *(smallest_samples(program, example) if program.state else [])]
    samples = [example]
    for sample in others if sizes else []:
        # Out of range, or drawn so that the model refuses it.
        with suppress(InputError, RuntimeError, ValueError, IndexError):
            signature.check_sizes(sample)
            with torch.no_grad(), kept_state(program):
                program.run(sample)
            samples.append(sample)
    return samples


def _second_call(session: Session, sample: Sample) -> float:
    """How many seconds the second of two calls takes."""
    taken = 0.0
    with restored_state(session):
        for _ in range(2):
            started = time.perf_counter()
            session(sample)
            taken = time.perf_counter() - started
    return taken


def _compare(other: Session, best: Session, samples: Sequence[Sample], seconds: float, least: int) -> tuple[bool, str]:
    """Whether `other` is faster over all samples, and the times in words.

    Compares lower quartiles, which other work on the machine disturbs least.
    """
    ratios: list[float] = []
    told: list[str] = []
    for sample in samples:
        with restored_state(other, best):
            timings = time_calls({"with": partial(other, sample), "without": partial(best, sample)}, seconds, least, ENOUGH)
        ratios.append(timings["with"].low_ms / timings["without"].low_ms)
        shapes = ", ".join(str(list(tensor.shape)) for tensor in sample)
        told.append(f"{timings['with']} ms with it and {timings['without']} ms without on inputs {shapes}")
    return geometric_mean(ratios) < _GAIN, "; ".join(told)
