"""Canonical passes that tests share: each compile of a model starts with the same ones, which give the same each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import NodeFacts, Step
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import format_pipeline

Key = tuple[object, ...]


@dataclass(frozen=True)
class Origin:
    """Where a program comes from: its model, and what the capture was given; `is_same` tells whether a model is still equal.

    edits, state: of the program when it was captured; with others it is another program.
    """

    key: Key
    model: nn.Module
    edits: int
    state: Sequence[torch.Tensor]
    is_same: Callable[[nn.Module], bool]
    with_weights_of: Callable[[nn.Module, nn.Module, Program], Program]

    def is_of(self, program: Program) -> bool:
        """Whether the program is still what was captured."""
        states = zip(self.state, program.state_tensors(), strict=True)
        return program.edits == self.edits and all(torch.equal(*pair) for pair in states) and self.is_same(self.model)


@dataclass(frozen=True)
class _Ran:
    """What the canonical passes gave for the first of equal models."""

    model: nn.Module
    program: Program
    steps: Sequence[Step]
    texts: Sequence[str]
    facts: Sequence[Mapping[str, NodeFacts]]
    outputs: list[list[object]]
    stretch: tuple[Pass, ...]


ORIGINS = "tests_origin"
_RAN: dict[Key, _Ran] = {}
_KEPT = 200
_steps: Callable[..., None] = Pipeline._steps


def steps(pipeline: Pipeline, run: Any, passes: Sequence[Pass], finished: int, count: int) -> None:
    """`Pipeline._steps`, with the canonical passes run and checked once in a session for equal models, inputs and checks."""
    origin: Origin | None = getattr(run.program, ORIGINS, None)
    leading = [*takewhile(lambda item: type(item).__module__.startswith("lissom.passes.canonical."), passes)]
    if origin is None or not leading or pipeline.metric is not None or not origin.is_of(run.program):
        _steps(pipeline, run, passes, finished, count)
        return
    sizes = tuple(tuple(tensor.shape) for sample in run.samples for tensor in sample)
    key = (origin.key, pipeline.checks, sizes, format_pipeline(leading))
    held = _RAN.pop(key, None)
    if held is None or not origin.is_same(held.model):
        held = _run(pipeline, run, leading, finished, count, origin.model)
    else:
        _take(run, held, origin)
    _RAN[key] = held
    if len(_RAN) > _KEPT:
        del _RAN[next(iter(_RAN))]
    _steps(pipeline, run, passes[len(leading) :], finished + len(leading), count)


def _run(pipeline: Pipeline, run: Any, passes: Sequence[Pass], finished: int, count: int, model: nn.Module) -> _Ran:
    began, stretch = len(run.history.steps), len(run.stretch)
    _steps(pipeline, run, passes, finished, count)
    history = run.history
    facts = [history.facts_of(index) for index in range(began, len(history.steps))]
    return _Ran(model, run.program, history.steps[began:], history.texts[began:], facts, run.outputs, run.stretch[stretch:])


def _take(run: Any, held: _Ran, origin: Origin) -> None:
    program = origin.with_weights_of(origin.model, held.model, held.program)
    program.about = run.program.about
    for name in program.state:
        program.set_weight(name, run.program.weight(name))
    run.program, run.outputs, run.stretch = program, held.outputs, (*run.stretch, *held.stretch)
    for step, text, facts in zip(held.steps, held.texts, held.facts, strict=True):
        run.history.record(step, text, facts)
