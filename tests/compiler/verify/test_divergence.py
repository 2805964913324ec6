"""Tests of lissom.compiler.verify.divergence: how far two programs' outputs are apart."""

import math

import pytest
import torch

from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.verify.divergence import (
    TOLERANCE,
    compare,
    first_difference,
    relative_error,
    run_samples,
    tolerance_of,
    tolerances,
)
from lissom.frontends.capture.export import capture
from tests.support.models import captured, feed_forward, normal

aten = torch.ops.aten
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("wanted", "found", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 1e-7], 0.1),
        ([NAN, 2.0], [NAN, 1.0], 0.5),
        ([NAN, 2.0], [2.0, NAN], INF),
        ([INF, 2.0], [INF, 2.0], 0.0),
        ([INF, 2.0], [-INF, 2.0], INF),
        ([INF, 2.0], [NAN, 2.0], INF),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([NAN, NAN], [NAN, NAN], 0.0),
        ([], [], 0.0),
    ],
)
def test_relative_error_is_largest_difference_over_largest_value(wanted, found, error):
    # float32 rounds the inputs to 6e-8 of themselves.
    assert relative_error(torch.tensor(wanted), torch.tensor(found)) == pytest.approx(error, rel=1e-6)


def test_integers_and_flags_must_be_equal():
    ids = torch.tensor([1, 2])
    assert relative_error(ids, ids.clone()) == 0.0
    assert relative_error(ids, ids + 1) == INF
    assert relative_error(ids > 1, ids > 0) == INF


def test_other_shapes_and_dtypes_are_infinitely_far():
    assert relative_error(torch.ones(2, 3), torch.ones(3, 2)) == INF
    assert relative_error(torch.ones(2), torch.ones(2).double()) == INF
    assert relative_error(torch.ones(2), 1.0) == INF


def test_numbers_and_nothing_must_be_equal():
    assert relative_error(3, 3) == 0.0
    assert relative_error(None, None) == 0.0
    assert relative_error(3, 4) == INF


def test_complex_numbers_are_compared_by_magnitude():
    assert relative_error(torch.tensor([2j]), torch.tensor([1j])) == 0.5


def test_float64_is_compared_in_float64():
    one = torch.ones(1, dtype=torch.float64)
    # The difference, 1e-12, is below the spacing of float32 at 1, which is 1.2e-7.
    assert relative_error(one, one + 1e-12) == pytest.approx(1e-12, rel=1e-3)


def test_halves_are_compared_in_float32():
    left = torch.full((1,), 6e4, dtype=torch.float16)
    assert relative_error(left, -left) == 2.0


def test_a_divergence_is_that_of_the_worst_output():
    same, far = torch.ones(3), torch.tensor([1.0, 1.0, 0.0])
    found = compare([[same, same]], [[same, far]])
    assert found.relative_error == 1.0
    # Cosines are computed in float64, unit roundoff 1e-16.
    assert found.cosine == pytest.approx(2 / math.sqrt(6), abs=1e-12)


def test_outputs_that_are_no_tensors_count_in_error_only():
    found = compare([[None, 3]], [[None, 4]])
    assert (found.relative_error, found.cosine) == (INF, 1.0)


def test_samples_give_outputs_and_state_is_restored():
    program = captured("counter")
    rows = normal(3, 4)
    first, second = run_samples(program, [[rows], [rows]])
    assert torch.equal(first[0], second[0])
    assert not first[0].requires_grad
    assert first[1].item() == 3.0
    assert program.weight("seen").item() == 0.0


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_tolerance_is_that_of_the_floating_type(dtype):
    program = capture(feed_forward().model.to(dtype), (normal(2, 5, 8).to(dtype),)).program
    assert tolerance_of(program) == TOLERANCE[dtype]


def with_casts(*dtypes: torch.dtype) -> Program:
    """A program whose first linear layer reads its input cast to some dtypes and back, and that also yields its input cast."""
    program = captured("feed_forward").copy()
    edit = Editor(program, "test-pass")
    node = program.nodes(aten.linear.default)[0]
    with edit.before(node):
        found = node.args[0]
        for dtype in (*dtypes, torch.float32):
            found = edit.call(aten.to.dtype, found, dtype)
        edit.change_call(node, aten.linear.default, found, *node.args[1:])
    with edit.before(program.output):
        cast = edit.call(aten.to.dtype, program.placeholders[0], torch.bfloat16)
    program.output.args = ([*program.output.args[0], cast],)
    return program


def test_output_tolerance_follows_coarsest_type_on_its_path():
    assert tolerances(with_casts()) == [TOLERANCE[torch.float32], TOLERANCE[torch.bfloat16]]
    assert tolerances(with_casts(torch.float16)) == [TOLERANCE[torch.float16], TOLERANCE[torch.bfloat16]]
    assert tolerance_of(with_casts()) == TOLERANCE[torch.bfloat16]


def test_flags_and_indices_carry_no_rounding():
    assert tolerances(with_casts(torch.bfloat16, torch.int64))[0] == TOLERANCE[torch.float32]
    assert tolerances(with_casts(torch.bfloat16, torch.bool))[0] == TOLERANCE[torch.float32]
    assert tolerances(with_casts(torch.bfloat16, torch.int8))[0] == TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("extreme", [-1e4, -1e30, torch.finfo(torch.float32).min])
def test_what_a_mask_leaves_neither_hides_errors_nor_escapes(extreme):
    values = normal(4, 8)
    masked = values.masked_fill(torch.arange(8) > 1, extreme)
    wrong = (values * 1.06).masked_fill(torch.arange(8) > 1, extreme)
    assert relative_error(masked, masked.clone()) == 0
    assert relative_error(masked, wrong) == pytest.approx(0.06, rel=1e-3)
    assert relative_error(masked, masked.where(masked > -1e3, extreme / 2)) == 0.5
    assert relative_error(masked, values) == pytest.approx(1, rel=1e-3)
    assert compare([[masked]], [[-values.masked_fill(torch.arange(8) > 1, -extreme)]]).cosine == pytest.approx(-1)


def test_small_values_beside_large_ones_get_their_tolerance():
    values = torch.tensor([1e-7, 1.0, 2.0])
    assert relative_error(values, values + torch.tensor([1e-6, 0, 0])) == pytest.approx(5e-7, rel=1e-3)


def doubled(name: str, target: object) -> Program:
    """A program with the first call of an operator doubled."""
    program = captured(name)
    edit = Editor(program, "doubles")
    node = program.nodes(target)[0]
    with edit.before(node):
        again = edit.call(target, *node.args)
        twice = edit.call(aten.mul.Tensor, again, 2)
    edit.replace(node, twice)
    return program


def test_first_difference_is_node_that_took_another_s_place():
    before, after = captured("feed_forward"), doubled("feed_forward", aten.gelu.default)
    node, error = first_difference(before, after, [normal(2, 5, 8)], 1e-5)
    assert node.name == "mul"
    assert error == 1.0


def test_equal_programs_have_no_first_difference():
    assert first_difference(captured("feed_forward"), captured("feed_forward"), [normal(2, 5, 8)], 0.0) is None


def test_a_difference_within_the_tolerance_is_none():
    before, after = captured("feed_forward"), doubled("feed_forward", aten.gelu.default)
    assert first_difference(before, after, [normal(2, 5, 8)], 1e6) is None


def test_state_of_its_own_is_no_difference():
    before, after = captured("counter"), captured("counter")
    after.set_weight("seen", before.weight("seen").clone())
    assert first_difference(before, after, [normal(3, 4)], 0.0) is None


def test_looking_for_a_difference_leaves_state_alone():
    program = captured("counter")
    assert first_difference(program, program.copy(), [normal(3, 4)], 0.0) is None
    assert program.weight("seen").item() == 0.0
