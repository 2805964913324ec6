"""Several threads compile at once, one module or several, while others go on using it; and compiling leaves no trace."""

from __future__ import annotations

import gc
import importlib
import logging
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

import lissom
from lissom.compiler.memory import heap_set_aside
from lissom.errors import CaptureError, LissomError
from lissom.frontends.capture.isolation import with_own_modules

_THREADS = 8
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """Two layers in training mode, one in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.dropout, self.down = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4)
        self.up.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.dropout(torch.relu(self.up(x))))


def at_once(work: Callable[[int], object]) -> list[object]:
    """What each of eight threads gives, all started together; an error of one is raised."""
    barrier = Barrier(_THREADS)

    def run(index: int) -> object:
        barrier.wait()
        return work(index)

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(run, range(_THREADS)))


def test_threads_compile_one_module_that_others_train_meanwhile() -> None:
    torch.manual_seed(0)
    model = Mixed()
    modes = [module.training for module in model.modules()]
    wanted = with_own_modules(model)(X)
    done, calls, odd = Event(), [0], list[object]()

    def use() -> None:
        while not done.is_set():
            found = model(X)
            calls[0] += 1
            if type(found) is not torch.Tensor or [module.training for module in model.modules()] != modes:
                odd.append(found)

    with ThreadPoolExecutor(1) as pool:
        using = pool.submit(use)
        try:
            compiled = at_once(lambda _: lissom.compile(model, X))
        finally:
            done.set()
        using.result()
    assert calls[0] > 10
    assert not odd
    assert [module.training for module in model.modules()] == modes
    for fast in compiled:
        torch.testing.assert_close(cast(lissom.CompiledModel, fast)(X), wanted)


def test_threads_compile_modules_of_their_own() -> None:
    models = [Mixed() for _ in range(_THREADS)]
    compiled = at_once(lambda index: lissom.compile(models[index], X))
    for model, fast in zip(models, compiled, strict=True):
        torch.testing.assert_close(cast(lissom.CompiledModel, fast)(X), model.eval()(X))


class Nesting(nn.Module):
    """Compiles a layer of its own in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting():
            lissom.optimize(nn.Linear(8, 8), X)
        return self.linear(x)


def test_a_model_may_compile_while_it_is_captured() -> None:
    model = Nesting()
    torch.testing.assert_close(lissom.compile(model, X)(X), model(X))


def test_nothing_of_the_process_is_changed() -> None:
    model = Mixed()
    loggers = [logging.getLogger(name) for name in ("torch.export._trace", "torch.fx.experimental.symbolic_shapes", "torch")]

    def state() -> list[object]:
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            [(logger.level, list(logger.filters), list(logger.handlers)) for logger in loggers],
            hasattr(importlib.import_module("torch.export._trace"), "print"),
            gc.isenabled(),
            gc.get_freeze_count(),
        ]

    before = state()
    lissom.compile(model, X, passes="exact,quantize{scheme=int8-weight}")
    assert state() == before
    for wrong in (torch.zeros(3, 5), torch.zeros(3, 8, dtype=torch.int64)):
        with pytest.raises(LissomError):
            lissom.compile(model, wrong)
    assert state() == before


class Drawing(nn.Module):
    """Draws numbers in evaluation mode, of every generator there is, and uses none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.rand([])
        random.random()
        np.random.rand()
        return self.linear(x)


def test_numbers_a_model_draws_are_given_back() -> None:
    model, states = Drawing(), (torch.get_rng_state(), random.getstate(), np.random.get_state()[2])
    lissom.compile(model, X)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[2] == states[2]


@pytest.mark.slow
def test_what_a_caller_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with heap_set_aside(), heap_set_aside():
            assert 0 < gc.get_freeze_count() <= frozen
        assert 0 < gc.get_freeze_count() <= frozen
    finally:
        gc.unfreeze()


def test_the_heap_is_set_aside_once_and_given_back() -> None:
    with heap_set_aside():
        frozen = gc.get_freeze_count()
        made: list[list[object]] = [[] for _ in range(1000)]
        # Frozen objects may die, of other threads too; a second freeze would add the lists just made.
        with heap_set_aside():
            assert 0 < gc.get_freeze_count() < frozen + len(made)
        assert 0 < gc.get_freeze_count() < frozen + len(made)
    assert not gc.get_freeze_count()


class Locked(nn.Module):
    """Holds something that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.event = Event()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_uncopyable_model_is_compiled_and_keeps_its_mode() -> None:
    model = Locked().train()
    assert with_own_modules(model) is model
    torch.testing.assert_close(lissom.compile(model, X)(X), model(X))
    assert model.training
    with pytest.raises(CaptureError):
        lissom.compile(model, torch.zeros(3, 5))
    assert model.training
    assert model.linear.training


def test_examples_and_buffers_are_left_as_they_were() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return self.linear(x) + self.seen

    model, example = Counting(), X.clone()
    compiled = lissom.compile(model, example)
    assert model.seen.item() == 0
    assert torch.equal(example, X)
    torch.testing.assert_close(compiled(X), model.linear(X) + 1)
