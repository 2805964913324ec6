"""Tests of lissom.compiler.calibration.ranges."""

from __future__ import annotations

import math

import pytest
import torch

from lissom.compiler.calibration.ranges import Range, measured_ranges, range_of
from tests.support.harness import Calls, capture_model
from tests.support.models import captured, counter, normal

HALF = torch.float16


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), ()])
def test_a_range_is_what_a_loop_finds(shape: tuple[int, ...]) -> None:
    value = normal(*shape) * 1e-4
    numbers = [float(item) for item in value.flatten()]
    rows = value.reshape(-1, shape[-1]).tolist() if shape else [[float(value)]]
    found = range_of(value, HALF)
    assert found.low == min(0.0, *numbers, 0.0)
    assert found.high == max(0.0, *numbers, 0.0)
    assert found.largest == max(map(abs, numbers))
    # A sum of squares in float64, taken in another order.
    assert found.norm == pytest.approx(max(math.sqrt(sum(item * item for item in row)) for row in rows), rel=1e-6)
    assert found.small == sum(abs(item) < 2**-14 for item in numbers) / len(numbers)


def test_zeros_and_what_is_not_finite_do_not_count() -> None:
    found = range_of(torch.tensor([[0.0, math.inf, -math.inf, math.nan, -3.0, 1e-6]]), HALF)
    assert found == Range(-3.0, pytest.approx(1e-6), pytest.approx(3.0), 0.5)  # pyright: ignore[reportArgumentType]


def test_no_numbers_have_a_range() -> None:
    assert range_of(torch.zeros(0, 4), HALF) == Range(0, 0, 0, 0)


def test_smallness_is_that_of_the_format() -> None:
    value = torch.tensor([1e-6, 1e-3])
    assert range_of(value, torch.float16).small == 0.5
    assert range_of(value, torch.bfloat16).small == 0


def test_ranges_join_over_samples_and_parts() -> None:
    program = capture_model(Calls(lambda x: x.chunk(2, -1)[0] * 10), normal(2, 4)).program
    data = [[torch.tensor([[1.0, 2, 3, -4]])], [torch.tensor([[-5.0, 1e-6, 0, 0]])]]
    found = measured_ranges(program, data, set(program), HALF)
    by_name = {node.name: item for node, item in found.items()}
    assert (by_name["x"].low, by_name["x"].high) == (-5, 3)
    assert by_name["x"].small == pytest.approx(1 / 6)
    assert by_name["chunk"] == by_name["x"] or by_name["chunk"].largest == 5
    assert by_name["mul"].low == -50
    assert by_name["mul"].high == 20


def test_padding_counts() -> None:
    program = captured("bert")
    inputs = torch.zeros(1, 3, dtype=torch.long)
    words = next(node for node in program.nodes(torch.ops.aten.embedding.default) if "word" in str(node.args[0]))
    table = program.weight(str(words.args[0].target)).detach().clone()  # pyright: ignore
    table[9] = 1e6
    program.set_weight(str(words.args[0].target), table)  # pyright: ignore
    padded, mask = inputs.clone(), torch.ones_like(inputs)
    padded[0, 2], mask[0, 2] = 9, 0
    sample = [mask if "mask" in leaf.path else padded if "ids" in leaf.path else inputs for leaf in program.signature.tensors]
    assert measured_ranges(program, [sample], {words}, HALF)[words].largest == 1e6


def test_state_is_restored_and_progress_reported() -> None:
    program, told = captured("counter"), []
    sample = [counter().args[0]]
    measured_ranges(program, [sample, sample], set(program), HALF, lambda *counts: told.append(counts))  # pyright: ignore
    assert float(program.weight("seen")) == 0
    assert told == [(1, 2), (2, 2)]
