"""Tests of the file of the teacher's values: what it gives back, and what a small disk costs."""

from __future__ import annotations

import resource
from collections.abc import Generator

import pytest
import torch

from lissom.compiler.training import cache
from lissom.compiler.training.cache import TargetCache
from lissom.compiler.training.teacher import Targets
from tests.support import captures
from tests.support.models import FeedForward, normal, seeded


def targets(seed: int) -> Targets:
    return Targets({0: normal(4, 8, seed=seed)}, {"add": 1e6 * normal(4, 8, seed=seed + 100)}, {0: None, "add": None})


@pytest.fixture
def small_files() -> Generator[None]:
    """No file grows beyond 300 bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_values_come_back_in_half_precision() -> None:
    found = TargetCache()
    made = [found.targets(index, lambda index=index: targets(index)) for index in range(3)]
    for index, first in enumerate(made):
        again = found.targets(index, lambda: pytest.fail("made twice"))
        assert torch.allclose(again.outputs[0], first.outputs[0], rtol=1e-3)  # eleven bits
        assert torch.allclose(again.hidden["add"], first.hidden["add"], rtol=1e-2)  # eight bits: too large for float16
    assert found.shortage() is None
    found.close()


@pytest.mark.parametrize("cause", ["room", "disk"])
def test_a_small_disk_costs_time_and_says_so(cause, request) -> None:
    if cause == "disk":
        request.getfixturevalue("small_files")
    found, calls = TargetCache(300 if cause == "room" else None), []
    for index in (0, 1, 2, 0, 1, 2):
        found.targets(index, lambda index=index: calls.append(index) or targets(index))
    assert calls == [0, 1, 2, 2]
    assert "had no room for the teacher's values of 1 of 3 batches, which were computed anew each time" in str(found.shortage())
    found.close()


def test_distill_notes_a_small_disk(monkeypatch) -> None:
    monkeypatch.setattr(cache, "_SHARE_OF_DISK", 0.0)
    data = [normal(4, 8, seed=seed) for seed in range(4)]
    passes = "prune-neurons{keep=0.5},distill{steps=4}"
    step = captures.optimize(seeded(FeedForward), normal(4, 8), passes=passes, data=data).report.history.steps[-1]
    assert any("no room for the teacher's values of 4 of 4 batches" in note for note in step.notes), step.notes
