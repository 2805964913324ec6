"""Tests of lissom.backends.microbatches: what is cut, where, and that nothing changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.backends import microbatches
from lissom.backends.microbatches import Cutting, batch_inputs, fastest_cutting
from lissom.frontends.capture.export import capture
from lissom.measure.timing import Timing
from tests.support.models import capture_of, normal, seeded


class Centered(nn.Module):
    """Takes from every row the mean of all of them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


class Ranked(nn.Module):
    """Keeps its shape, and mixes the rows all the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(0)


class Turned(nn.Module):
    """Returns the batch as its last dimension."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, -1) * 2


@pytest.mark.parametrize(
    ("name", "inputs"), [("feed_forward", (0,)), ("bert", (0, 1)), ("gpt2", (0, 1))], ids=lambda item: str(item)
)
def test_models_of_independent_rows_can_be_cut(name, inputs):
    assert batch_inputs(capture_of(name).program) == inputs


@pytest.mark.parametrize("module", [Centered, Turned], ids=lambda item: item.__name__)
def test_a_model_whose_rows_meet_is_not_cut(module):
    found = capture(seeded(module), (normal(3, 4, 5),), dynamic={"x": {0: "batch"}})
    assert batch_inputs(found.program) == ()


@pytest.mark.parametrize("count", [1, 3, 4, 5, 7, 8, 9, 32])
def test_pieces_add_up_to_the_whole(count):
    seen = []

    def call(inputs):
        seen.append(len(inputs[0]))
        return [inputs[0] * 2 + inputs[1], inputs[2] - 1]

    cutting = Cutting((0, 2), 4 * 6)
    x, shared, y = normal(count, 6), normal(6, seed=1), normal(count, 2, seed=2)
    first, second = cutting(call, [x, shared, y])
    assert torch.equal(first, x * 2 + shared)
    assert torch.equal(second, y - 1)
    assert sum(seen) == count
    # Less than two pieces are not cut; else they are as even as can be, and none is larger than asked for.
    assert max(seen) <= 4 if count >= 8 else len(seen) == 1
    assert max(seen) - min(seen) <= 1


def clock(monkeypatch, milliseconds):
    """Let a call with so many rows take so long, by the book: what is tested is the choice, not the machine."""

    def time_calls(calls, seconds, **_):
        rows = {name: 1 if name == "one" else int(name) for name in calls}
        return {name: Timing(*[milliseconds(count)] * 3, runs=5) for name, count in rows.items()}

    monkeypatch.setattr(microbatches, "time_calls", time_calls)


def plainly(program):
    return lambda inputs: [leaf for leaf in program.run(inputs) if isinstance(leaf, torch.Tensor)]


def test_what_is_faster_in_pieces_is_cut(monkeypatch):
    clock(monkeypatch, lambda rows: rows * (1 if rows <= 16 else 1.1))
    found = capture_of("feed_forward")
    cutting, told = fastest_cutting(plainly(found.program), found.program, found.example, 0.1)
    assert cutting == Cutting((0,), 16 * found.example[0][:1].numel())
    assert told == "1 ms a row in batches of 16 and 1.1 ms in batches of 64"


@pytest.mark.parametrize(
    "milliseconds", [lambda rows: rows, lambda rows: 5 + rows, lambda rows: rows * (1 if rows < 64 else 1.04)]
)
def test_what_is_hardly_faster_in_pieces_stays_whole(monkeypatch, milliseconds):
    clock(monkeypatch, milliseconds)
    found = capture_of("feed_forward")
    assert fastest_cutting(plainly(found.program), found.program, found.example, 0.1) is None


def test_rows_found_to_depend_on_each_other_stay_together(monkeypatch):
    clock(monkeypatch, lambda rows: rows * (1 if rows <= 16 else 2))
    found = capture(seeded(Ranked), (normal(3, 5),), dynamic={"x": {0: "batch"}})
    assert batch_inputs(found.program) == (0,)
    assert fastest_cutting(plainly(found.program), found.program, found.example, 0.1) is None
