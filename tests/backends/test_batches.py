"""Tests of lissom.backends.batches: what is cut, where, and that nothing changes."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from lissom.backends.batches import Cutting, batch_inputs, fastest_cutting
from lissom.frontends.export import capture
from tests.models import capture_of, normal, seeded


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


def slow_when_large(program):
    """Runs the program, and takes longer a row the more rows there are."""

    def call(inputs):
        rows = len(inputs[0])
        time.sleep(1e-3 * rows * (1 if rows <= 4 else 2))
        return [leaf for leaf in program.run(inputs) if isinstance(leaf, torch.Tensor)]

    return call


def test_what_is_faster_in_pieces_is_cut():
    found = capture_of("feed_forward")
    cutting, told = fastest_cutting(slow_when_large(found.program), found.program, found.example, 0.1)
    rows = cutting.elements // found.example[0][:1].numel()
    assert rows <= 4
    assert f"in batches of {rows} and" in told


def test_what_is_as_fast_whole_stays_whole():
    found = capture_of("feed_forward")

    def call(inputs):
        time.sleep(2e-3 + 1e-3 * len(inputs[0]))
        return [leaf for leaf in found.program.run(inputs) if isinstance(leaf, torch.Tensor)]

    assert fastest_cutting(call, found.program, found.example, 0.1) is None


def test_rows_that_turn_out_to_depend_on_each_other_stay_together():
    found = capture(seeded(Ranked), (normal(3, 5),), dynamic={"x": {0: "batch"}})
    assert batch_inputs(found.program) == (0,)
    assert fastest_cutting(slow_when_large(found.program), found.program, found.example, 0.1) is None
