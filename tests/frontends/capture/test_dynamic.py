"""Tests of lissom.frontends.capture.export: which sizes may vary, and models that cannot be captured."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.export import Dim

from lissom.errors import CaptureError, InputError
from lissom.frontends.capture.export import Capture, capture
from tests.support.models import FeedForward, blocked, branching, capture_of, feed_forward, nested, normal, tiny_bert, tokens


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(CaptureError) as caught:
        call()
    return str(caught.value)


def shape(found: Capture) -> str:
    return found.program.signature.describe()


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("feed_forward", "dynamic: batch (1 or more), sequence (1 or more)"),
        ("counter", "dynamic: batch (1 or more)"),
        ("blocked", "dynamic: batch (1 or more), sequence (2 or more)"),
        ("convolution", "dynamic: batch (1 or more)"),
        ("bert", "dynamic: batch (1 or more), sequence (1 to 32)"),
        ("llama", "dynamic: batch (1 or more), sequence (1 or more)"),
    ],
)
def test_sizes_that_may_vary_are_found_and_noted(name, note):
    assert capture_of(name).notes == (note,)


@pytest.mark.parametrize("sizes", [(1, 5), (2, 1), (1, 1)])
def test_an_example_of_size_1_varies_too(sizes):
    found = capture(feed_forward().model, (normal(*sizes, 8),))
    assert shape(found) == "(x: f32[batch, sequence, 8])"
    assert found.program(normal(3, 7, 8)).shape == (3, 7, 8)


def test_a_transformer_captured_at_batch_1_takes_other_batches():
    case = tiny_bert()
    inputs = {"input_ids": tokens(1, 4), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    found = capture(case.model, (), inputs)
    ids, mask = tokens(3, 6), torch.ones(3, 6, dtype=torch.long)
    with torch.no_grad():
        wanted = case.model(ids, mask).last_hidden_state
        # The same operators on other strides: float32 sums of at most 24 terms, unit roundoff 6e-8.
        torch.testing.assert_close(found.program(ids, mask).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)


class Masked(nn.Module):
    """Attention under a mask of pairs of tokens. positions: as many as are known, or none."""

    def __init__(self, positions: int = 0) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(32, 8), nn.Linear(8, 8)
        self.positions = nn.Parameter(torch.ones(positions, 8)) if positions else None

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) if self.positions is None else self.table(ids) + self.positions
        q = self.layer(x)[:, None]
        return nn.functional.scaled_dot_product_attention(q, q, q, mask if mask.dim() != 3 else mask[:, None])


@pytest.mark.parametrize("leading", [(2, 1), (2,), (), (2, 1, 1)])
def test_pair_mask_sequence_varies_with_the_tokens(leading):
    model = Masked()
    ids = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(0))
    whole = torch.ones(7, 7, dtype=torch.bool).tril()
    mask = whole.expand(*leading, 7, 7) if len(leading) < 3 else torch.ones(*leading, 7, dtype=torch.bool)
    found = capture(model, (ids, mask))
    assert found.notes == ("dynamic: batch (1 or more), sequence (1 or more)",)
    ids, mask = ids.repeat(2, 2)[:3, :5], (mask[:1].expand(3, *mask.shape[1:]) if leading else mask)[..., :5]
    mask = mask if len(leading) == 3 else mask[..., :5, :]
    torch.testing.assert_close(found.program(ids, mask), model(ids, mask))


def test_height_and_width_of_equal_size_stay_apart():
    found = capture(nn.Upsample(scale_factor=2), (normal(2, 3, 8, 8),), dynamic={"input": {2: "height", 3: "width"}})
    assert shape(found) == "(input: f32[2, 3, height, width])"


def test_a_sequence_that_the_model_fixes_is_noted():
    found = capture(Masked(positions=7), (torch.zeros(2, 7, dtype=torch.long), torch.ones(2, 1, 7, 7, dtype=torch.bool)))
    assert shape(found) == "(ids: i64[batch, 7], mask: bool[batch, 1, 7, 7])"
    assert found.notes == (
        "dynamic: batch (1 or more)",
        "dimension 1 of 'ids' is fixed at 7: the model combines it with sizes that do not vary",
    )


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1).exp()


def test_a_size_the_model_fixes_is_fixed():
    found = capture(FixedBatch(), (normal(2, 3),))
    assert shape(found) == "(x: f32[2, sequence])"
    assert found.notes == ("dynamic: sequence (1 or more)",)


class TakesPathBySize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.shape[0] == 2 else x - 1


def test_a_path_taken_by_a_size_fixes_the_size():
    assert shape(capture(TakesPathBySize(), (normal(2, 3),))) == "(x: f32[2, sequence])"


class WantsNumber(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x.shape[1]) is not int:
            raise TypeError("the width is no number")
        return x + 1


def test_what_was_tried_in_vain_is_noted():
    found = capture(WantsNumber(), (normal(2, 3),))
    assert shape(found) == "(x: f32[batch, 3])"
    assert found.notes == ("dynamic: batch (1 or more)", "tried batch and sequence dynamic: the width is no number")


class ActsOtherwiseWhenTraced(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if type(x.shape[1]) is int else x - 1


def test_size_where_program_and_model_disagree_is_not_promised():
    found = capture(ActsOtherwiseWhenTraced(), (normal(2, 3),))
    assert shape(found) == "(x: f32[batch, 3])"
    assert found.notes[1].startswith(
        "tried batch and sequence dynamic: the captured program differs from ActsOtherwiseWhenTraced by "
    )


class AnyNames(nn.Module):
    def forward(self, x: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, *others.values()])


def test_arguments_of_any_name_are_captured():
    found = capture(AnyNames(), (normal(2, 3),), {"last": normal(2, 3)}, dynamic=False)
    assert shape(found) == "(x: f32[2, 3], *, last: f32[2, 3])"
    assert found.program(normal(2, 3), last=normal(2, 3)).shape == (4, 3)


@pytest.mark.xfail(strict=True, reason="torch.export 2.13 loses track of `**others` where a size of one varies")
def test_arguments_of_any_name_may_vary():
    found = capture(AnyNames(), (normal(2, 3),), {"last": normal(2, 3)})
    assert shape(found) == "(x: f32[batch, sequence], *, last: f32[batch, sequence])"


def test_nothing_varies_when_dynamic_is_off():
    found = capture(feed_forward().model, (normal(1, 5, 8),), dynamic=False)
    assert shape(found) == "(x: f32[1, 5, 8])"
    assert found.notes == ("every size is fixed at the example's",)


def test_the_caller_may_name_what_varies():
    found = capture(feed_forward().model, (normal(2, 5, 8),), dynamic={"x": {1: "length"}})
    assert shape(found) == "(x: f32[2, length, 8])"
    assert found.notes == ("dynamic: length (1 or more)",)


def test_the_caller_may_bound_what_varies():
    dynamic = {"x": {0: "rows", 1: Dim("length", min=2, max=64)}}
    found = capture(feed_forward().model, (normal(2, 5, 8),), dynamic=dynamic)
    assert shape(found) == "(x: f32[rows, length, 8])"
    assert found.notes == ("dynamic: rows (1 or more), length (2 to 64)",)


@pytest.mark.parametrize(
    ("dim", "range_text"),
    [(Dim("length", min=3), "3 or more"), (Dim("length", max=9), "1 to 9"), (Dim("length"), "1 or more")],
)
def test_a_range_may_be_open_at_either_end(dim, range_text):
    found = capture(feed_forward().model, (normal(2, 5, 8),), dynamic={"x": {1: dim}})
    assert found.notes == (f"dynamic: length ({range_text})",)


def test_a_range_is_cut_by_what_the_model_takes():
    dynamic = {name: {1: Dim("length", max=500)} for name in ("input_ids", "attention_mask")}
    case = tiny_bert()
    assert capture(case.model, (), case.kwargs, dynamic=dynamic).notes == ("dynamic: length (1 to 32)",)


def test_an_argument_of_nested_tensors_may_be_named():
    case = nested()
    found = capture(case.model, (), case.kwargs, dynamic={"past": {0: "rows"}})
    assert "past['layer'][0]: f32[rows, 3, 4], past['layer'][1]: f32[rows, 3, 4]" in shape(found)


@pytest.mark.parametrize(
    ("dynamic", "reason"),
    [
        ({"y": {0: "batch"}}, "dynamic names 'y', which is not an argument of this call; it has x"),
        ({"x": {3: "width"}}, "dynamic names dimension 3 of 'x', which has 3, counted from 0"),
        ({"x": {-1: "width"}}, "dynamic names dimension -1 of 'x', which has 3, counted from 0"),
        ({"x": {1: 7}}, "dynamic gives 7 for dimension 1 of 'x'; give a name, or Dim(name, min=, max=)"),
        (
            {"x": {2: "width"}},
            "dimension 2 (width) of 'x' was to be dynamic, but the model fixes it at 8; leave it out of dynamic=",
        ),
        (
            {"x": {1: Dim("length", min=6)}},
            "the example has size 5 in dimension 1 of 'x', outside of the range dynamic= gives it; pass an example inside",
        ),
        (
            {"x": {0: "size", 1: "size"}},
            "dynamic gives the name 'size' to dimensions that vary independently; give each a name of its own",
        ),
    ],
)
def test_a_dimension_that_cannot_vary_is_refused(dynamic, reason):
    assert refusal(lambda: capture(feed_forward().model, (normal(2, 5, 8),), dynamic=dynamic)) == reason


def test_an_argument_without_dimensions_cannot_vary():
    case = nested()
    assert refusal(lambda: capture(case.model, (), case.kwargs, dynamic={"double": {0: "batch"}})) == (
        "dynamic names dimension 0 of 'double', which has 0, counted from 0"
    )


def test_sizes_that_must_agree_cannot_vary_alone():
    case = tiny_bert()
    assert refusal(lambda: capture(case.model, (), case.kwargs, dynamic={"input_ids": {0: "batch"}})) == (
        "the program and the model disagree at sizes other than the example's"
    )


def test_a_condition_on_sizes_is_kept():
    case = blocked()
    found = capture(case.model, case.args)
    assert found.program.signature.conditions
    for length in (4, 12, 20):
        x = normal(3, length, 8)
        # Softmax over four values in float32, unit roundoff 6e-8.
        torch.testing.assert_close(found.program(x), case.model(x), rtol=1e-6, atol=1e-6)


class Halving(nn.Module):
    """Averages neighbours, with the last one alone where the number is odd, as long as there are few."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : 4 * (x.shape[1] // 4)] if not torch.jit.is_tracing() and x.shape[1] > 6 else x * 2


def test_fixed_size_model_is_captured_after_failed_attempts():
    """PyTorch has no rule for the sizes of this operator, so that only an export with fixed sizes succeeds."""

    class FakeQuantized(nn.Module):
        def forward(self, x):
            return torch.fake_quantize_per_tensor_affine(x, 0.05, 3, -128, 127)

    x = normal(3, 4)
    found = capture(FakeQuantized(), (x,))
    assert shape(found) == "(x: f32[3, 4])"
    assert len(found.notes) == 4
    assert not x.__dict__, "the caller's tensor has marks of dynamic dimensions"
    torch.testing.assert_close(found.program(x), FakeQuantized()(x), rtol=0.0, atol=0.0)


def test_size_where_model_output_changes_is_not_promised():
    """A choice by size is kept as a condition, or the size is fixed; either way no call gets a wrong answer."""
    program = capture(Halving(), (normal(2, 5, 3),)).program
    for length in (5, 6, 10):
        x = normal(2, length, 3)
        try:
            found = program(x)
        except InputError:
            continue
        torch.testing.assert_close(found, Halving()(x), rtol=0, atol=0)


class Blocks(nn.Module):
    """Blocks that change nothing at inference, one in the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x + 1
            with torch.autocast("cpu", enabled=False):
                y = y * x
        return y @ x.mT


def test_blocks_that_change_nothing_are_part_of_the_graph():
    program = capture(Blocks(), (normal(2, 5, 3),)).program
    names = [str(node.target) for node in program.nodes()]
    assert not any("wrap" in name for name in names)
    x = normal(3, 4, 3)
    torch.testing.assert_close(program(x), Blocks()(x), rtol=0, atol=0)


def test_value_branch_is_refused_in_one_sentence_with_line(capfd):
    case = branching()
    found = refusal(lambda: capture(case.model, case.args))
    assert capfd.readouterr() == ("", "")
    assert found.startswith("Branching cannot be captured: models.py:")
    assert found.endswith(
        " (`if x.sum() > 0:`) decides on the values of a tensor, and a graph has one path for all values; "
        "use torch.where or torch.cond there, or compile the part without it"
    )
    assert "\n" not in found


class CondInside(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x - 1, (x,))


def test_control_flow_in_graph_is_refused_with_its_line():
    found = refusal(lambda: capture(CondInside(), (normal(2, 3),)))
    assert found.startswith("the model holds control flow (cond) at test_dynamic.py:")
    assert found.endswith("; a program is one straight graph: take the branch out of the model")


class ChangesInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return x + 1


def test_a_model_that_changes_its_input_is_refused():
    assert refusal(lambda: capture(ChangesInput(), (normal(2, 3),))) == (
        "the model changes its argument 'x' in place; pass a copy inside the model"
    )


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


def test_a_random_model_is_refused():
    found = refusal(lambda: capture(Noisy(), (normal(2, 3),)))
    assert found.startswith("the captured program differs from Noisy by ")
    assert found.endswith(" relative, allowed 2e-05; the model is random in evaluation mode")


def test_a_model_that_is_no_module_is_refused():
    assert refusal(lambda: capture(torch.relu, (normal(2, 3),))) == (
        "the model is a builtin_function_or_method; pass a torch.nn.Module"
    )


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = FeedForward()
    assert refusal(lambda: capture(model, (normal(2, 5, 8),))) == (
        "weight 'norm.weight' is on the meta device and has no values; load the model's weights first"
    )


def test_an_example_that_does_not_fit_forward_is_refused():
    found = refusal(lambda: capture(feed_forward().model, ()))
    assert found.startswith("the example inputs do not fit FeedForward.forward(x: ")
    assert found.endswith(": missing a required argument: 'x'; a tuple is positional, a mapping is keywords")


def test_example_model_cannot_run_is_refused_with_line():
    found = refusal(lambda: capture(feed_forward().model, (normal(2, 5, 9),)))
    assert found.startswith("FeedForward itself fails on the example inputs, before it is captured: models.py:")
    assert "(`return x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))`): RuntimeError: " in found


def test_an_input_of_an_unknown_kind_is_refused():
    assert refusal(lambda: capture(feed_forward().model, (object(),))) == (
        "example input [0] is a object; inputs are tensors, numbers, flags, text, None, or nests of these: convert it first"
    )


class Two(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, y + 1


def test_dimensions_of_unlike_names_stay_apart():
    program = capture(Two(), (normal(3, 8), normal(3, 8)), dynamic={"x": {0: "rows"}, "y": {0: "others"}}).program
    left, right = program(normal(6, 8), normal(4, 8))
    assert (left.shape[0], right.shape[0]) == (6, 4)
