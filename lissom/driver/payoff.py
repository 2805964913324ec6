"""Speedup and size reduction of a lossy pass: times and sizes of the lowered programs with and without it, by shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean

from lissom.artifacts.weights import stored_bytes
from lissom.backends.base import Backend, Executable, restored_state
from lissom.backends.builds import Builds
from lissom.compiler.ir.interpreter import REFUSALS
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.options import Goal
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.pipeline.pipeline import Verdict
from lissom.errors import LissomError
from lissom.measure.timing import ENOUGH, Timing, apart, time_calls

FASTER = 0.97
"""A program counts as faster below this fraction of the time, and as slower above its inverse: two timings of one program
differ by as much."""
_SETTLED = 0.7
"""Settling weights changes the ratio of two programs' times by less: by 0.73 for int4 against bfloat16, where both wait for
memory (decision 0031).
"""
_SECONDS, _LEAST = 0.5, 4
"""Fewer than five runs have one warm-up call, and of a large program that takes as long as all runs that a verdict needs."""


@dataclass(frozen=True)
class Payoff:
    """Compares programs as the backends run them.

    Attributes:
        backends: those that may run the result.
        lowerings: their lowering passes, by name.
        samples: the inputs for timing.
        goal: what a pass must not make worse.
        builds: keeps the executables of the programs after the last verdict.
    """

    backends: Sequence[Backend]
    lowerings: Mapping[str, Sequence[Pass]]
    samples: Sequence[Sample]
    goal: Goal
    builds: Builds

    def __call__(self, before: Mapping[str, Program], after: Mapping[str, Program]) -> Verdict | None:
        """The figures of all backends for the lowered programs; the pass is kept if it gains on one of them.

        None if a backend cannot build or run one of the programs, or has no kernels for the quantized layers of `after`:
        building the result raises the backend's own error.
        """
        self.builds.keep([*before.values(), *after.values()])
        verdict = self._verdict(before, after)
        reverted = verdict is not None and not verdict.keep
        self.builds.keep((before if reverted else after).values())
        return verdict

    def _verdict(self, before: Mapping[str, Program], after: Mapping[str, Program]) -> Verdict | None:
        verdicts: list[Verdict] = []
        for backend in self.backends:
            try:
                verdict = self._compare(backend, before[backend.name], after[backend.name])
            except (LissomError, *REFUSALS):
                return None
            if verdict is None:
                return None
            verdicts.append(verdict)
        kept = [verdict for verdict in verdicts if verdict.keep]
        return Verdict("; ".join(verdict.figures for verdict in kept or verdicts), bool(kept))

    def _compare(self, backend: Backend, before: Program, after: Program) -> Verdict | None:
        if backend.simulated(after):
            return None
        built = [self.builds.build(backend, program, self.samples[0]).executable for program in (before, after)]
        if getattr(built[1], "simulated", ()):
            return None
        without, size = stored_bytes(before), stored_bytes(after)
        smaller = size < without

        def keeps(ratio: float) -> bool:
            return ratio < FASTER or (smaller and (self.goal == "memory" or ratio * FASTER <= 1))

        ratio, times = self._time(built)
        if keeps(ratio * _SETTLED) != keeps(ratio / _SETTLED):
            backend.settle(before)
            backend.settle(after)
            ratio, times = self._time(built)
        figures = f"{ratio:.2f} x the time ({times}), {size / 1e6:.3g} MB against {without / 1e6:.3g}"
        if keeps(ratio):
            return Verdict(f"on {backend.name} {figures}", True)
        if smaller:
            return Verdict(f'slower on {backend.name}: {figures}; goal="memory" keeps it', False)
        return Verdict(f"neither faster nor smaller on {backend.name}: {figures}; goal=None keeps it", False)

    def _time(self, built: Sequence[Executable]) -> tuple[float, str]:
        """The time of the second executable over that of the first, the mean over all samples, and both times in words."""
        ratios: list[float] = []
        times: list[str] = []
        with restored_state(*built):
            for sample in self.samples:
                without, with_pass = (partial(executable, sample) for executable in built)
                timings = time_calls({"without": without, "with": with_pass}, _SECONDS, _LEAST, ENOUGH, enough=apart)
                ratios.append(timings["with"].median_ms / timings["without"].median_ms)
                times.append(_times(timings["with"], timings["without"], sample))
        return geometric_mean(ratios), ", ".join(times)


def _times(timing: Timing, without: Timing, sample: Sample) -> str:
    shapes = ", ".join(dict.fromkeys(str(list(tensor.shape)) for tensor in sample))
    return f"{timing} ms against {without} on {shapes}"
