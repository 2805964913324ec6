"""Tests of lissom.compiler.ir.match."""

import pytest
import torch
from torch import fx, nn

from lissom.compiler.ir import match
from lissom.compiler.ir.program import Program
from lissom.frontends.capture.export import capture
from tests.support.models import captured, normal

aten = torch.ops.aten


class Scalars(nn.Module):
    """Products with numbers, constants and parameters on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(0.5))
        self.register_buffer("row", torch.ones(4))
        self.register_buffer("steps", torch.tensor(0.0))
        self.learned = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.steps.add_(1)
        return x * 3, self.factor * x, x * self.row, x * self.learned, x * self.steps


class Casts(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        high = x.to(torch.float64)
        return high.to(torch.float16) + 1, (x > 0).to(torch.float32) + 1, x.to(torch.int32).to(torch.float32) + 1


class Views(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        transposed = x.transpose(0, 1)
        first, second = x.exp().chunk(2, 1)
        return transposed[0], first, second.neg()


@pytest.fixture
def scalars() -> Program:
    return capture(Scalars(), (normal(2, 4),)).program


def outputs(program: Program) -> list[fx.Node]:
    return list(program.output.args[0])


def test_casts_between_floating_types_are_stripped():
    program = capture(Casts(), (normal(2, 3),)).program
    plus = program.nodes(aten.add.Tensor)[0]
    assert match.strip_casts(plus.args[0]) is program.placeholders[0]


def test_casts_that_change_values_more_than_by_rounding_stay():
    program = capture(Casts(), (normal(2, 3),)).program
    for plus in program.nodes(aten.add.Tensor)[1:]:
        assert match.strip_casts(plus.args[0]) is plus.args[0]


def test_the_other_argument_is_found_on_either_side(scalars):
    (x,) = scalars.placeholders
    product = outputs(scalars)[1]
    factor = product.args[0]
    assert match.other_argument(product, factor) is x
    assert match.other_argument(product, x) is factor
    assert match.other_argument(product, product) is None


def test_numbers_are_literals_and_constants_of_rank_0(scalars):
    found = [match.number(scalars, item) for product in outputs(scalars)[:2] for item in product.args]
    assert found == [None, 3.0, 0.5, None]


def test_parameters_rows_and_state_are_no_numbers(scalars):
    row, learned, steps = (outputs(scalars)[index].args[1] for index in (2, 3, 4))
    assert match.number(scalars, row) is None
    assert match.number(scalars, learned) is None
    assert match.number(scalars, steps) is None


def test_views_share_the_memory_of_what_they_view():
    program = capture(Views(), (normal(2, 4),)).program
    (x,) = program.placeholders
    (transposed,), (exponential,) = program.nodes(aten.transpose.int), program.nodes(aten.exp.default)
    assert match.is_view(transposed)
    assert not match.is_view(exponential)
    assert match.memory_of(outputs(program)[0]) is x
    assert match.memory_of(outputs(program)[1]) is exponential
    assert match.views_of(x) == [x, transposed, outputs(program)[0]]


def test_memory_is_handed_out_whole_or_as_a_view():
    program = capture(Views(), (normal(2, 4),)).program
    assert match.is_handed_out(program, program.placeholders[0])
    assert match.is_handed_out(program, program.nodes(aten.exp.default)[0])
    assert not match.is_handed_out(captured("feed_forward"), captured("feed_forward").placeholders[0])
