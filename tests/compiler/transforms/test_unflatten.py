"""Tests of flat_products."""

from __future__ import annotations

import torch

from lissom.compiler.ir.editor import Editor
from lissom.compiler.transforms.unflatten import unflatten_where
from tests.support.harness import Calls, aten, calls, capture_model
from tests.support.models import captured, normal

WEIGHT, BIAS = normal(8, 6), normal(6)


def flat(x: torch.Tensor) -> torch.Tensor:
    return torch.addmm(BIAS, x.reshape(-1, 8), WEIGHT).reshape(x.shape[0], x.shape[1], 6)


def test_a_product_of_rows_becomes_a_linear_layer() -> None:
    program = capture_model(Calls(flat), normal(2, 5, 8)).program.copy()
    unflatten_where(Editor(program, "test"), lambda trial: True)
    assert (calls(program, aten.linear.default), calls(program, aten.addmm.default)) == (1, 0)
    x = normal(3, 4, 8, seed=1)
    # Sums of eight float32 products of order 1.
    torch.testing.assert_close(program(x).double(), x.double() @ WEIGHT.double() + BIAS.double(), rtol=0, atol=2e-6)


def test_the_program_is_left_where_it_does_not_help() -> None:
    program = captured("gpt2")
    before, asked = program.text(), []
    unflatten_where(Editor(program, "test"), lambda trial: bool(asked.append(calls(trial.program, aten.linear.default))))
    assert program.text() == before
    assert asked == [8]


def test_other_products_are_left() -> None:
    def other(x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(BIAS, x.transpose(0, 1).reshape(-1, 8), WEIGHT).reshape(-1, 6)

    program = capture_model(Calls(other), normal(2, 5, 8)).program.copy()
    unflatten_where(Editor(program, "test"), lambda trial: True)
    assert calls(program, aten.addmm.default) == 1
