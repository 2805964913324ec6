"""Tests of lissom.backends.fastest: `backend="fastest"`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

import pytest
import torch

import lissom
from lissom import backends
from lissom.backends.base import Backend
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.errors import UnsupportedError
from lissom.passes.canonical.remove_no_ops import RemoveNoOps
from tests.support.models import feed_forward, normal
from tests.support.passes import DoubleGelu


class Quick(Backend):
    """Runs the program, after a pass of its own."""

    name: ClassVar[str] = "quick"

    def lowering(self, device):
        assert device == torch.device("cpu")
        return (RemoveNoOps(),)

    def build(self, program, example):
        return program.run


class Slow(Quick):
    """The same, after a rest."""

    name: ClassVar[str] = "slow"

    def lowering(self, device):
        return ()

    def build(self, program, example):
        def run(inputs):
            time.sleep(0.02)
            return program.run(inputs)

        return run


class Broken(Slow):
    """Cannot build."""

    name: ClassVar[str] = "broken"

    def build(self, program, example):
        raise RuntimeError("out of luck\nand more lines")


class Absent(Slow):
    """Is not on this machine."""

    name: ClassVar[str] = "absent"

    def missing(self):
        return "backend 'absent' needs a package; install it"


class Wrong(Slow):
    """Has a lowering pass that changes the numbers."""

    name: ClassVar[str] = "wrong"

    def lowering(self, device):
        return (DoubleGelu(),)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("lissom.backends.fastest._SECONDS", 0.01)


def offer(monkeypatch, *choice: type[Backend]) -> Mapping[str, type[Backend]]:
    table = {item.name: item for item in choice}
    monkeypatch.setattr(backends, "BACKENDS", table)
    return table


def compile_fastest(**options):
    return lissom.compile(feed_forward().model, normal(2, 5, 8), backend="fastest", **options)


def notes(fast: lissom.CompiledModel) -> Sequence[str]:
    return fast.report.history.steps[-1].notes


def test_the_quickest_is_kept_and_named(monkeypatch):
    offer(monkeypatch, Slow, Quick)
    fast = compile_fastest()
    assert fast.backend == "quick"
    (line,) = notes(fast)
    assert line.startswith("fastest: quick is used; on inputs [2, 5, 8]: slow ")
    assert ", quick " in line
    assert " ".join(line.split()) in " ".join(str(fast.report).split())
    assert fast.report.title == "FeedForward on quick"


def test_each_backend_has_the_passes_of_its_own(monkeypatch):
    offer(monkeypatch, Slow, Quick)
    history = compile_fastest(passes="exact").report.history
    assert history.pipeline.endswith(",remove-no-ops")
    assert history.steps[-1].spelling == "remove-no-ops"
    assert history.steps[-1].index == len(history.steps) - 1 == len(history.texts) - 1


def test_what_cannot_run_is_reported(monkeypatch):
    offer(monkeypatch, Absent, Broken, Wrong, Slow)
    fast = compile_fastest()
    assert fast.backend == "slow"
    first, *others = notes(fast)
    assert first.startswith("fastest: slow is used; on inputs [2, 5, 8]: slow ")
    assert others[0] == "fastest: absent could not run: backend 'absent' needs a package; install it"
    assert others[1] == "fastest: broken could not run: RuntimeError: out of luck"
    assert others[2].startswith("fastest: wrong could not run: double-gelu was rolled back: its outputs differ")


def test_when_nothing_runs_all_reasons_are_given(monkeypatch):
    offer(monkeypatch, Absent, Broken)
    with pytest.raises(UnsupportedError) as caught:
        compile_fastest()
    assert str(caught.value) == (
        "no backend can run this model: absent: backend 'absent' needs a package; install it; broken: RuntimeError: out of luck"
    )


def test_progress_counts_every_build(monkeypatch):
    offer(monkeypatch, Slow, Quick)
    told = []
    compile_fastest(progress=lambda *now: told.append(now))
    count = told[0][2]
    assert [now[1] for now in told] == list(range(count + 1))
    assert [now[0] for now in told[-3:]] == ["build slow", "build quick", "time slow and quick"]


def test_shared_passes_run_once(monkeypatch):
    offer(monkeypatch, Slow, Quick)
    runs = []
    monkeypatch.setattr(Pipeline, "run_each", lambda self, *rest, run=Pipeline.run_each: runs.append(0) or run(self, *rest))
    told = []
    compile_fastest(progress=lambda *now: told.append(now[0]))
    assert len(runs) == 1
    assert told.count("raise-attention") == 1


@pytest.mark.slow
def test_the_backends_there_are_compete():
    fast = compile_fastest()
    assert fast.backend in backends.BACKENDS
    assert all(f"{item.name} " in notes(fast)[-1] for item in backends.find_backends(backends.FASTEST))
    # Two products of float32 with sums of at most 12 terms, unit roundoff 6e-8.
    torch.testing.assert_close(fast(normal(3, 4, 8)), feed_forward().model(normal(3, 4, 8)), rtol=1e-5, atol=1e-6)
