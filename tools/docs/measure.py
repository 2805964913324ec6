"""Measurements of one pass on one example: sizes, latency and error, with the machine."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lissom.backends import find_backend
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample, check_samples
from lissom.compiler.parallel.partitioned_program import PartitionedProgram
from lissom.compiler.pipeline.history import History
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.verify.divergence import tolerance_of
from lissom.driver.options import read_data, resolve_passes, split_inputs
from lissom.frontends.capture.export import capture
from lissom.measure.machine import device_name
from lissom.measure.timing import Timing, time_calls
from tools.docs.examples import EXAMPLES, Example


@dataclass(frozen=True)
class Gain:
    """The example before and after the pass.

    relative_error: of the outputs; allowed: its tolerance.
    """

    timings: tuple[Timing, Timing]
    relative_error: float
    allowed: float


@dataclass(frozen=True)
class _Shown:
    """An example that is captured: its program, the passes up to the one that is shown, and what they are checked on."""

    program: Program
    example: Sample
    passes: list[Pass]
    samples: list[Sample]
    data: list[Sample]
    labels: list[torch.Tensor | None]

    def pipeline(self, passes: list[Pass], **options: Any) -> Pipeline:
        """The pipeline of some of the passes."""
        return Pipeline(passes, self.samples, data=self.data, labels=self.labels, **options)


@cache
def run_example(name: str) -> History:
    """The history of a pass's example, up to the first pass of that name in its pipeline."""
    shown = _capture(EXAMPLES[name], name)
    # The code of the page runs the same passes with all checks.
    return shown.pipeline(shown.passes, checks="off").run(shown.program)[1]


def measure(example: Example, name: str, seconds: float) -> Gain:
    """Run the example's pipeline up to the first pass of that name, and measure the pass; seconds: per timing."""
    shown = _capture(example, name)
    before, _ = shown.pipeline(shown.passes[:-1]).run(shown.program)
    # From the start again, because some passes need the program before the first approximation.
    after, history = shown.pipeline(shown.passes).run(shown.program)
    eager = find_backend("eager")
    # A partitioned program runs all its ranks node by node, so the program it is compared with runs node by node too.
    lock_step = isinstance(after, PartitionedProgram)
    runs = [program.run if lock_step else eager.build(program, shown.example) for program in (before, after)]
    timed = time_calls({str(index): lambda run=run: run(shown.example) for index, run in enumerate(runs)}, seconds)
    error = history.steps[-1].relative_error or 0.0
    return Gain((timed["0"], timed["1"]), error, tolerance_of(before))


def _capture(example: Example, name: str) -> _Shown:
    torch.manual_seed(0)
    inputs = eval(example.inputs, {"torch": torch})
    args, kwargs = split_inputs(inputs)
    captured = capture(example.model().eval(), args, kwargs)
    signature = captured.program.signature
    passes = list(resolve_passes(example.passes))
    at = next(index for index, pass_ in enumerate(passes) if pass_.name() == name)
    given = eval(example.data or "[]", {"torch": torch})
    data, labels = read_data(given, signature)
    samples = list(check_samples(signature, captured.example))
    return _Shown(captured.program, captured.example, passes[: at + 1], samples, data, labels)


def machine() -> str:
    """The processor and the versions, `AMD EPYC, 2 threads; Python 3.12.3, torch 2.13.0+cpu`."""
    processor = device_name(torch.device("cpu"))
    return f"{processor}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}"
