"""Building programs of a search: compiled, timed side by side with another one, and evaluated."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from lissom.artifacts.weights import stored_bytes
from lissom.backends.base import Backend, restored_state
from lissom.compiler.ir.fingerprint import program_fingerprint
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.memory import free_dropped_programs
from lissom.compiler.pipeline.options import NUMERIC, Checks, Metric, read_score
from lissom.driver.compile import compile_model
from lissom.driver.options import Inputs, Settings
from lissom.errors import InputError
from lissom.measure.timing import ENOUGH, time_calls
from lissom.runtime.compiled_model import CompiledModel, own_state
from lissom.tuning.divergence import Divergence
from lissom.tuning.sites import Group, Option
from lissom.tuning.spelling import pipeline_of

_QUICK, _CAREFUL, _OF_BUILD = 0.25, 1.0, 0.1
"""Seconds of timing for each program, in the cost table and of a verified candidate; or this part of the time to build it, if
that is more, since five calls of a large program say little."""


def silent(_what: str, _finished: int, _total: int) -> None:
    """Shows no progress of a single program."""


@dataclass(frozen=True)
class Variant:
    """Program-wide options: the backend's name, whether layers in floating point are in bfloat16, and whether padding
    is left out."""

    backend: str
    bf16: bool = False
    packed: bool = False

    @property
    def pipeline(self) -> str:
        """Its passes as text."""
        return self.passes((), (), ())

    def passes(
        self,
        groups: Sequence[Group],
        options: Sequence[Option],
        linears: Sequence[str],
        *,
        steps: int = 0,
        fitted: bool = True,
    ) -> str:
        """The pipeline of these options: see `pipeline_of`."""
        whole = {"bf16": self.bf16, "packed": self.packed}
        return pipeline_of(groups, options, linears, steps=steps, fitted=fitted, **whole)


@dataclass(frozen=True)
class Timed:
    """The time of a program over that of another one, timed in turns: median, lower and upper quartile."""

    ratio: float
    low: float
    high: float


@dataclass
class Workshop:
    """Builds candidates of one program.

    Attributes:
        program: the exact one.
        example: of the model's inputs.
        sample: the flat inputs for timing.
        data: all batches, for passes that calibrate.
        exact: the program without lossy passes, compiled for each variant.
        seconds: the time of the last build.
    """

    program: Program
    example: Inputs
    sample: Sample
    data: Sequence[Inputs]
    backends: Mapping[str, str | Backend]
    exact: dict[Variant, CompiledModel] = field(default_factory=dict[Variant, CompiledModel])
    seconds: float = 0.0

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the exact program and its weights."""
        return program_fingerprint(self.program)

    def build(self, pipeline: str, backend: str, checks: Checks = "numeric") -> CompiledModel:
        """The program after the passes, compiled for a backend. Raises LissomError."""
        settings = Settings(
            passes=pipeline,
            backend=self.backends[backend],
            checks=checks,
            # Where values do not matter, one batch is enough for patterns that are measured.
            data=self.data if checks in NUMERIC else self.data[:1],
            goal=None,
            progress=silent,
        )
        free_dropped_programs(self.program.parameter_bytes)
        started = time.monotonic()
        compiled = compile_model(self.program, self.example, settings)
        self.seconds = time.monotonic() - started
        return compiled

    def base(self, variant: Variant) -> CompiledModel:
        """The program of a variant without further passes. Raises LissomError."""
        if variant not in self.exact:
            self.exact[variant] = self.build(variant.pipeline, variant.backend)
        return self.exact[variant]

    def time(self, compiled: CompiledModel, base: CompiledModel, *, careful: bool = False) -> Timed:
        """The time of a program over that of `base`."""
        calls = {"base": partial(base.run, self.sample), "compiled": partial(compiled.run, self.sample)}
        with restored_state(base._executable, compiled._executable):
            seconds = max(_CAREFUL if careful else _QUICK, _OF_BUILD * self.seconds)
            timings = time_calls(calls, seconds, most=ENOUGH)
        base_ms, ms = timings["base"], timings["compiled"]
        # Other processes only ever add time, so the lower quartiles are compared.
        ratio = ms.low_ms / base_ms.low_ms
        return Timed(ratio, ratio * ms.low_ms / ms.median_ms, ratio * ms.high_ms / ms.median_ms)

    def milliseconds(self, compiled: CompiledModel) -> float:
        """The time of one call: the lower quartile of many."""
        with restored_state(compiled._executable):
            return time_calls({"compiled": partial(compiled.run, self.sample)}, _CAREFUL, most=ENOUGH)["compiled"].low_ms

    @staticmethod
    def size(compiled: CompiledModel) -> int:
        """The bytes of its weights in an artifact."""
        return stored_bytes(compiled.program)


@dataclass(frozen=True)
class Quality:
    """The quality loss of a program: the drop of the metric, or without one the relative output error.

    Attributes:
        score: of the exact program; 0 without a metric.
        noise: between two measurements of the exact program.
    """

    divergence: Divergence
    metric: Metric | None
    score: float = 0.0
    noise: float = 0.0

    @classmethod
    def of(cls, exact: CompiledModel, divergence: Divergence, metric: Metric | None, bound: float) -> Quality:
        """Measures the exact program twice.

        Raises:
            InputError: if the metric fails, returns NaN, or differs by more than the bound.
        """
        if metric is None:
            return cls(divergence, None)
        first, second = (_score(metric, exact, original=True) for _ in range(2))
        noise = abs(first - second)
        if noise > bound:
            raise InputError(
                f"metric returned {first:.6g} and then {second:.6g} for the same model, which differ by more than "
                f"max_drop={bound:g}; make it deterministic, or raise max_drop"
            )
        return cls(divergence, metric, first, noise)

    def drop(self, compiled: CompiledModel) -> tuple[float, float]:
        """The drop, and the divergence of the outputs. Raises InputError if the metric fails."""
        squared = self.divergence.of(partial(_run_by_itself, compiled))
        if self.metric is None or math.isinf(squared):
            return squared**0.5, squared
        return self.score - _score(self.metric, compiled, original=False), squared


def _run_by_itself(compiled: CompiledModel, sample: Sample) -> Sequence[object]:
    """The outputs; a KV cache is then as it was."""
    with own_state(compiled):
        return compiled.run(sample)


def _score(metric: Metric, model: CompiledModel, *, original: bool) -> float:
    try:
        with torch.no_grad():
            score = metric(model)
    except KeyboardInterrupt:
        raise
    # The metric is the caller's code, and may raise anything; the error is kept as the cause.
    except Exception as error:
        raise InputError(f"metric raised {type(error).__name__}: {error}; it takes a model and returns one number") from error
    return read_score(score, original=original)
