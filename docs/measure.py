"""Measurements of one pass on one example: sizes, latency and error, with the machine."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from examples import Example

from lissom.backends import find_backend
from lissom.compiler.ir.samples import check_samples
from lissom.compiler.parallel.partitioned_program import PartitionedProgram
from lissom.compiler.pipeline.history import Size
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.verify.divergence import tolerance_of
from lissom.driver.options import resolve_passes, split_inputs
from lissom.frontends.export import capture
from lissom.inspect.timing import Timing, time_calls


@dataclass(frozen=True)
class Gain:
    """The example before and after the pass.

    relative_error: of the outputs; allowed: its tolerance.
    """

    sizes: tuple[Size, Size]
    timings: tuple[Timing, Timing]
    relative_error: float
    allowed: float


def measure(example: Example, name: str, seconds: float) -> Gain:
    """Run the example's pipeline up to the first pass of that name, and measure the pass; seconds: per timing."""
    torch.manual_seed(0)
    inputs = eval(example.inputs, {"torch": torch})
    args, kwargs = split_inputs(inputs)
    captured = capture(example.model().eval(), args, kwargs)
    passes = resolve_passes(example.passes)
    at = next(index for index, item in enumerate(passes) if item.name() == name)
    samples = check_samples(captured.program.signature, captured.example)
    given = eval(example.data or "[]", {"torch": torch})
    data = [captured.program.signature.flatten(*split_inputs(item)) for item in given]
    before, _ = Pipeline(passes[:at], samples, data=data).run(captured.program)
    # From the start again, because some passes need the program before the first approximation.
    after, history = Pipeline(passes[: at + 1], samples, data=data).run(captured.program)
    eager = find_backend("eager")
    # A partitioned program runs all its ranks node by node, so the program it is compared with runs node by node too.
    lock_step = isinstance(after, PartitionedProgram)
    runs = [item.run if lock_step else eager.build(item, captured.example) for item in (before, after)]
    timed = time_calls({str(index): lambda run=run: run(captured.example) for index, run in enumerate(runs)}, seconds)
    error = history.steps[-1].relative_error or 0.0
    return Gain((Size.of(before), Size.of(after)), (timed["0"], timed["1"]), error, tolerance_of(before))


def machine() -> str:
    """The processor and the versions, `AMD EPYC, 2 threads; Python 3.12.3, torch 2.13.0+cpu`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{found}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}"
