"""Tests of lissom.compiler.ir.signature."""

import re
from collections.abc import Callable

import pytest
import sympy
import torch
from torch import nn
from torch.utils._sympy import functions

from lissom.compiler.ir.signature import Dimension, evaluate
from lissom.errors import InputError
from lissom.frontends.capture.export import capture
from tests.support.models import captured, normal, tokens

BERT = "(*, input_ids: i64[batch, sequence], attention_mask: i64[batch, sequence])"


def ones(batch: int = 2, length: int = 5) -> torch.Tensor:
    return torch.ones(batch, length, dtype=torch.long)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


@pytest.fixture(scope="module")
def bert():
    return captured("bert")


@pytest.fixture(scope="module")
def nested():
    return captured("nested")


def pair(batch: int = 2, length: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(batch, length, 4), normal(batch, length, 4, seed=1)


def test_a_signature_reads_as_the_call(bert, nested):
    assert bert.signature.describe() == BERT
    assert nested.signature.describe() == (
        "(*, {past['layer'][0]: f32[batch, sequence, 4], past['layer'][1]: f32[batch, sequence, 4]}, double=True)"
    )


def test_arguments_pass_by_position_and_by_name(bert):
    by_name = bert(input_ids=tokens(), attention_mask=ones()).last_hidden_state
    by_position = bert(tokens(), ones()).last_hidden_state
    mixed = bert(tokens(), attention_mask=ones()).last_hidden_state
    assert torch.equal(by_name, by_position)
    assert torch.equal(by_name, mixed)


def test_an_argument_captured_by_position_passes_by_name():
    program = captured("feed_forward")
    x = normal(2, 5, 8)
    assert torch.equal(program(x=x), program(x))


def test_what_is_returned_has_the_class_the_model_returns(bert):
    found = bert(tokens(), ones())
    assert type(found).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
    assert found.pooler_output.shape == (2, 16)


def test_flatten_and_arguments_are_inverse(nested):
    keys, values = pair()
    flat = nested.signature.flatten((), {"past": {"layer": (keys, values)}, "double": True})
    args, kwargs = nested.signature.arguments(flat)
    assert args == ()
    assert list(kwargs) == ["past", "double"]
    assert kwargs["double"] is True
    assert kwargs["past"]["layer"][0] is keys
    assert kwargs["past"]["layer"][1] is values


def test_a_nest_goes_in_and_comes_out(nested):
    found = nested(past={"layer": pair()}, double=True)
    assert list(found) == ["past", "sum", "double"]
    assert found["sum"][1] is None
    assert found["double"] is True
    assert isinstance(found["past"]["layer"], tuple)


def test_an_unknown_argument_is_refused_with_the_nearest_name(bert):
    assert refusal(lambda: bert(input_id=tokens(), attention_mask=ones())) == (
        f"there is no argument 'input_id'; did you mean 'input_ids'? the program takes {BERT}"
    )


def test_unknown_argument_like_no_other_is_refused_with_call(bert):
    assert refusal(lambda: bert(tokens(), ones(), zebra=1)) == f"there is no argument 'zebra'; the program takes {BERT}"


def test_a_missing_argument_is_refused(bert):
    assert refusal(lambda: bert(tokens())) == f"argument 'attention_mask' is missing; the program takes {BERT}"


def test_argument_of_model_that_was_not_captured_is_refused(bert):
    assert refusal(lambda: bert(tokens(), ones(), token_type_ids=tokens())) == (
        f"argument 'token_type_ids' was not among the example inputs, so the program does not have it; it takes {BERT}: "
        f"add 'token_type_ids' to example_inputs and compile again"
    )


def test_uncaptured_argument_of_model_may_be_none(bert):
    assert bert(tokens(), ones(), token_type_ids=None).last_hidden_state.shape == (2, 5, 16)


def test_an_argument_given_twice_is_refused(bert):
    assert refusal(lambda: bert(tokens(), ones(), input_ids=tokens())) == (
        "argument 'input_ids' is given twice, by position and by name; give it once"
    )


def test_too_many_positional_arguments_are_refused():
    program = captured("feed_forward")
    x = normal(2, 5, 8)
    assert refusal(lambda: program(x, x)) == ("2 positional arguments given; the program takes (x: f32[batch, sequence, 8])")


def test_a_wrong_dtype_is_refused(bert):
    assert refusal(lambda: bert(tokens().int(), ones())) == (
        "argument 'input_ids' is i32[2, 5]; the program takes i64[batch, sequence]: pass that dtype and rank"
    )


def test_a_wrong_rank_is_refused(bert):
    assert refusal(lambda: bert(tokens()[0], ones())) == (
        "argument 'input_ids' is i64[5]; the program takes i64[batch, sequence]: pass that dtype and rank"
    )


def test_a_tensor_elsewhere_is_refused(bert):
    assert refusal(lambda: bert(tokens().to("meta"), ones())) == (
        "argument 'input_ids' is i64[2, 5]@meta; the program takes i64[batch, sequence]: move it with .to('cpu')"
    )


def test_a_number_for_a_tensor_is_refused(bert):
    assert refusal(lambda: bert(3, ones())) == (
        "argument 'input_ids' is a int; the program takes a tensor, i64[batch, sequence]"
    )


def test_a_list_for_a_tensor_is_refused(bert):
    assert refusal(lambda: bert([1, 2], ones())) == "argument 'input_ids' is nested as [*, *]; the program takes *"


def test_a_wrong_fixed_size_is_refused():
    program = captured("feed_forward")
    assert refusal(lambda: program(normal(2, 5, 9))) == (
        "argument 'x' has size 9 in dimension 2; allowed: 8; compile again with an example of that size, "
        "or mark the dimension dynamic"
    )


def test_a_size_over_the_maximum_is_refused(bert):
    assert refusal(lambda: bert(tokens(2, 33), ones(2, 33))) == (
        "argument 'input_ids' has size 33 in dimension 1 (sequence); allowed: 1 to 32"
    )


def test_an_empty_batch_is_refused(bert):
    assert refusal(lambda: bert(tokens(0), ones(0))) == (
        "argument 'input_ids' has size 0 in dimension 0 (batch); allowed: 1 or more"
    )


def test_batches_that_differ_between_arguments_are_refused(bert):
    assert refusal(lambda: bert(tokens(3), ones(2))) == (
        "argument 'attention_mask' has size 2 in dimension 0 (batch); allowed: 3, the batch of another argument in this call"
    )


@pytest.mark.parametrize(
    ("given", "nesting"),
    [
        (lambda: {"layer": (*pair(), normal(2, 3, 4))}, "{layer: (*, *, *)}"),
        (lambda: {"layer": list(pair())}, "{layer: [*, *]}"),
        (lambda: {"first": pair()}, "{first: (*, *)}"),
        (lambda: pair()[0], "*"),
    ],
    ids=["one more", "a list", "another key", "a tensor"],
)
def test_a_wrong_nesting_is_refused(nested, given, nesting):
    found = refusal(lambda: nested(past=given(), double=True))
    assert found == f"argument 'past' is nested as {nesting}; the program takes {{layer: (*, *)}}"


def test_leaf_of_wrong_kind_is_named_by_its_path(nested):
    assert refusal(lambda: nested(past={"layer": (pair()[0], 3)}, double=True)) == (
        "argument 'past['layer'][1]' is a int; the program takes a tensor, f32[batch, sequence, 4]"
    )


def test_a_constant_is_fixed_at_capture(nested):
    assert refusal(lambda: nested(past={"layer": pair()}, double=False)) == (
        "argument 'double' is False; the program was captured with True fixed: "
        "pass True, or compile again with False among the example inputs"
    )


def test_a_constant_may_be_left_out(nested):
    assert nested(past={"layer": pair()})["double"] is True


def test_sizes_that_break_a_condition_are_refused():
    program = captured("blocked")
    assert program(normal(3, 12, 8)).shape == (3, 12, 8)
    found = refusal(lambda: program(normal(2, 7, 8)))
    assert re.fullmatch(
        r"sizes batch = 2, sequence = 7 break a condition found while capturing the model, "
        r"Eq\(Mod\(.*sequence.*\), 0\); pass sizes that meet it",
        found,
    )


class TwoPlusOne(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y[1:]


def test_size_made_from_another_is_refused_with_expression():
    program = capture(TwoPlusOne().eval(), (normal(5), normal(6))).program
    assert program.signature.describe() == "(x: f32[batch], y: f32[batch + 1])"
    assert program(normal(3), normal(4)).shape == (3,)
    assert refusal(lambda: program(normal(3), normal(5))) == (
        "argument 'y' has size 5 in dimension 0 (batch + 1); allowed: batch + 1"
    )


def test_a_range_reads_as_words():
    assert Dimension("batch", 1, None).range == "1 or more"
    assert Dimension("sequence", 2, 512).range == "2 to 512"


def test_expression_is_evaluated_with_size_for_each_symbol():
    batch = sympy.Symbol("s0", integer=True, positive=True)
    assert evaluate(batch * 3 + 1, {batch: 4}) == 13
    assert evaluate(7, {}) == 7


@pytest.mark.parametrize(
    "size",
    [
        lambda batch: batch / 2,
        lambda batch: batch + sympy.Float(0.5),
        lambda batch: sympy.Pow(batch - 3, -1),
        lambda batch: functions.FloorDiv(8, batch - 3),
        lambda batch: functions.Mod(8, batch - 3),
        lambda batch: functions.ModularIndexing(batch, batch - 3, 2),
    ],
)
def test_an_expression_that_is_no_whole_number_is_refused(size):
    batch = sympy.Symbol("batch", integer=True, positive=True)
    with pytest.raises(InputError, match=r"^the size .* is no whole number where batch = 3; pass other sizes$"):
        evaluate(size(batch), {batch: 3})
