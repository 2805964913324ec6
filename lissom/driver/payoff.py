"""The speedup and size reduction of a lossy pass, measured on the lowered programs with and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from lissom.artifacts.weights import stored_bytes
from lissom.backends.base import Backend
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.errors import LissomError
from lissom.inspect.timing import ENOUGH, Timing, time_calls

FASTER = 0.97
"""A program counts as faster below this fraction of the time: two timings of one program differ by as much."""
_SECONDS = 0.5


@dataclass(frozen=True)
class Payoff:
    """Compares programs as the backends run them.

    backends: those that may run the result. lowerings: their lowering passes, by name. example: the inputs for timing.
    """

    backends: Sequence[Backend]
    lowerings: Mapping[str, Sequence[Pass]]
    example: Sample

    def __call__(self, before: Program, after: Program) -> str | None:
        """The reason to revert, with both timings and sizes; None if `after` is smaller or faster on any backend.

        None too if a backend cannot run one of the programs, or has no kernels for the quantized layers of `after`: building
        the result raises the backend's own error.
        """
        reasons: list[str] = []
        for backend in self.backends:
            try:
                reason = self._compare(backend, before, after)
            except LissomError:
                return None
            if reason is None:
                return None
            reasons.append(reason)
        return "; ".join(reasons) or None

    def _compare(self, backend: Backend, before: Program, after: Program) -> str | None:
        lowering = Pipeline(self.lowerings[backend.name], checks="off")
        programs = [lowering.run(program)[0] for program in (before, after)]
        sizes = [stored_bytes(program) for program in programs]
        if sizes[1] < sizes[0] or backend.simulated(programs[1]):
            return None
        built = [backend.build(program, self.example) for program in programs]
        if getattr(built[1], "simulated", ()):
            return None
        calls = [partial(executable, self.example) for executable in built]
        without, found = time_calls(dict(zip(("without", "with"), calls, strict=True)), _SECONDS, most=ENOUGH).values()
        if found.median_ms < FASTER * without.median_ms:
            return None
        shapes = ", ".join(str(list(tensor.shape)) for tensor in self.example)
        return (
            f"neither faster nor smaller on {backend.name}: {_figures(found, sizes[1])} with it, {_figures(without, sizes[0])} "
            f"without, on inputs {shapes}; only_if_faster=False keeps it"
        )


def _figures(timing: Timing, size: int) -> str:
    return f"{timing} ms and {size / 1e6:.3g} MB"
