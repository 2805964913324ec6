"""The fastest of several backends: each builds the program, all are timed on the example, and the best is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from lissom.backends import FASTEST
from lissom.backends.base import Backend, Executable, restored_state
from lissom.backends.builds import Builds
from lissom.backends.simulated_layers import SimulatedLayer, account, count_kernels, explain, refuse
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.history import History
from lissom.errors import LissomError, UnsupportedError
from lissom.measure.timing import ENOUGH, time_calls

_SECONDS = 1.0
"""Seconds of timing for each backend."""
_SLOW_BUILD = 1.0
"""Builds that take longer, in seconds, are noted in the history."""


@dataclass(frozen=True)
class Built:
    """A program, its executable, and its history."""

    backend: Backend
    program: Program
    history: History
    executable: Executable


def build_fastest(
    backends: Sequence[Backend],
    lowered: Mapping[str, tuple[Program, History] | LissomError],
    example: Sample,
    progress: Callable[[str, int], None],
    builds: Builds,
    *,
    simulate: bool = False,
) -> Built:
    """Build the program with every backend, and keep the fastest on the example; a single backend is not timed.

    The history records the times, and why a backend could not run.

    The error of a single backend passes through.

    Args:
        lowered: by backend name its lowered program, or the error of lowering.
        progress: called with the current step and the number of builds left.
        builds: keeps the executables that were built before.
        simulate: allow quantized layers without a kernel to run in floating point; else they are refused.

    Raises:
        UnsupportedError: when several fail and none is left.
    """
    built: dict[str, Built] = {}
    failed: dict[str, Exception] = {}
    left = sum(not isinstance(outcome, LissomError) for outcome in lowered.values())
    for backend in backends:
        name, outcome = backend.name, lowered[backend.name]
        try:
            if isinstance(outcome, LissomError):
                raise outcome
            progress(f"build {name}", left)
            left -= 1
            built[name] = _build(backend, *outcome, example, builds, simulate)
        # The errors of other compilers and runtimes have no common class; each is noted in the history.
        except Exception as error:
            if len(lowered) == 1:
                raise
            failed[name] = error
    if not built:
        reasons = "; ".join(f"{name}: {_first_line(error)}" for name, error in failed.items())
        raise UnsupportedError(f"no backend can run this model: {reasons}")
    best = next(iter(built.values()))
    if len(lowered) > 1:
        progress("time " + " and ".join(built), 0)
        with restored_state(*(candidate.executable for candidate in built.values())):
            timings = time_calls(
                {name: partial(candidate.executable, example) for name, candidate in built.items()}, _SECONDS, most=ENOUGH
            )
        best = built[min(timings, key=lambda name: timings[name].median_ms)]
        shapes = ", ".join(str(list(tensor.shape)) for tensor in example)
        listed = ", ".join(f"{name} {timing} ms" for name, timing in timings.items())
        best.history.note(f"{FASTEST}: {best.backend.name} is used; on inputs {shapes}: {listed}")
    for name, error in failed.items():
        best.history.note(f"{FASTEST}: {name} could not run: {_first_line(error)}")
    return best


def _build(backend: Backend, program: Program, history: History, example: Sample, builds: Builds, simulate: bool) -> Built:
    left = explain(backend.simulated(program), history.steps)
    total = len(left) + count_kernels(program)
    if not simulate:
        refuse(backend.name, left, total)
    _, _, executable, seconds = builds.build(backend, program, example)
    started = time.perf_counter()
    backend.confirm(executable, program, example)
    backend.settle(program)
    seconds += time.perf_counter() - started
    if not simulate:
        simulated: Sequence[SimulatedLayer] = getattr(executable, "simulated", ())
        refuse(backend.name, simulated, getattr(executable, "quantized", len(simulated)))
    if seconds > _SLOW_BUILD:
        history.note(f"{backend.name} built the program in {seconds:.1f} s")
    if total:
        history.note(account(left, total))
    for sentence in getattr(executable, "notes", ()):
        history.note(sentence)
    return Built(backend, program, history, executable)


def _first_line(error: Exception) -> str:
    first = str(error).partition("\n")[0]
    return first if isinstance(error, LissomError) else f"{type(error).__name__}: {first}"
