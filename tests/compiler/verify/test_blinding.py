"""Wrong passes that a verifier could be blind to: each is refused by its name, and the same pass without its fault is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn

from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.samples import check_samples
from lissom.compiler.pipeline.history import History
from lissom.compiler.pipeline.pass_kinds import Approximation, Rewrite
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.errors import VerifyError
from lissom.frontends.capture.export import Capture, capture
from lissom.passes import PASSES
from tests.support.models import normal, seeded, tiny_bert, tokens

aten = torch.ops.aten
NEGATIVE = torch.finfo(torch.float32).min


Find = Callable[[Editor], fx.Node]
Make = Callable[[Editor, fx.Node], fx.Node]


def wrong(find: Find, make: Make) -> Rewrite:
    """A pass that puts what `make` gives in the place of what `find` finds."""

    @dataclass(frozen=True)
    class Wrong(Rewrite):
        def run(self, edit: Editor) -> None:
            node = find(edit)
            readers = list(node.users)
            with edit.before(node.next):
                made = make(edit, node)
            for reader in readers:
                reader.replace_input_with(node, made)

    return Wrong()


def run(captured: Capture, find: Find, make: Make) -> History:
    samples = check_samples(captured.program.signature, captured.example)
    return Pipeline([wrong(find, make)], samples=samples).run(captured.program)[1]


def refused(captured: Capture, find: Find, make: Make) -> str:
    with pytest.raises(VerifyError, match=r"^wrong was rolled back: ") as caught:
        run(captured, find, make)
    return str(caught.value)


def given(index: int) -> Find:
    """The input of that number."""
    return lambda edit: edit.program.placeholders[index]


def last(target: object) -> Find:
    return lambda edit: edit.program.nodes(target)[-1]


def scaled(by: float) -> Make:
    return lambda edit, node: edit.call(aten.mul.Tensor, node, by)


def constant(value: float) -> Make:
    return lambda edit, node: edit.call(aten.full_like.default, node, value)


def bert(rows: int = 2, **inputs: torch.Tensor) -> Capture:
    ids = tokens(rows, 8)
    return capture(tiny_bert().model, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs})


class Masked(nn.Module):
    """Gives scores of which a mask hides some, as heads of span and choice models do."""

    def __init__(self, hidden: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.hidden = hidden

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.linear(x).tanh()
        return scores.masked_fill(torch.arange(8) > 4, self.hidden)


class Additive(nn.Module):
    """Attention with a mask that is added, or that says what is seen or hidden."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = x @ x.transpose(1, 2)
        scores = scores.masked_fill(mask, -1e4) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ x


class Windowed(nn.Module):
    """Causal attention that sees the last eight tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])
        apart = places[:, None] - places
        seen = (apart >= 0) & (apart < 8)
        return (x @ x.transpose(1, 2)).masked_fill(~seen, NEGATIVE).softmax(-1) @ x


class Mixed(nn.Module):
    """Two outputs: the second, and only it, goes through bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x).tanh(), x.bfloat16().exp().float()


class Long(nn.Module):
    """Scales positions from a length on, as rotary embeddings for long texts do."""

    def __init__(self, threshold: int) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1])
        factor = torch.where(places.max() >= self.threshold, 0.5, 1.0)
        return (x + (places * factor)[:, None].sin()).tanh()


@pytest.mark.parametrize("hidden", [-1e4, -1e30, NEGATIVE, -float("inf")])
def test_what_a_mask_leaves_hides_no_error_beside_it(hidden: float) -> None:
    found = capture(seeded(lambda: Masked(hidden)), (normal(2, 8),))
    assert "by 0.05" in refused(found, last(aten.tanh.default), scaled(1.05))


@pytest.mark.parametrize("hidden", [-1e4, -1e30, NEGATIVE, -float("inf")])
def test_what_a_mask_leaves_hides_no_loss_beside_it(hidden: float) -> None:
    found = capture(seeded(lambda: Masked(hidden)), (normal(2, 8),))

    @dataclass(frozen=True)
    class Loses(Approximation):
        def run(self, edit: Editor) -> None:
            wrong(last(aten.tanh.default), scaled(0.94)).run(edit)

    samples = check_samples(found.program.signature, found.example)
    step = Pipeline([Loses()], samples=samples).run(found.program)[1].steps[-1]
    assert step.relative_error == pytest.approx(0.06, rel=1e-3)


@pytest.mark.parametrize("hidden", [-1e4, -1e30, NEGATIVE])
def test_what_a_mask_leaves_must_be_right_itself(hidden: float) -> None:
    found = capture(seeded(lambda: Masked(hidden)), (normal(2, 8),))
    refused(found, last(aten.masked_fill.Scalar), lambda edit, node: edit.call(aten.clamp.default, node, hidden / 2))


def test_one_outlier_channel_hides_no_error_in_the_others() -> None:
    class Outlier(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (x.tanh() * torch.where(torch.arange(256) == 3, 1e5, 1.0),)

    found = capture(Outlier(), (normal(2, 4, 256),))
    refused(found, last(aten.tanh.default), lambda edit, node: edit.call(aten.add.Tensor, node, 1e-3))


def test_bfloat16_beside_an_output_does_not_widen_its_tolerance() -> None:
    found = capture(seeded(Mixed), (normal(2, 8),))
    refused(found, last(aten.tanh.default), scaled(1.05))
    refused(found, last(aten.tanh.default), scaled(1.0001))


def test_a_scale_in_bfloat16_is_told_from_rounding() -> None:
    found = capture(seeded(Mixed).bfloat16(), (normal(2, 8).bfloat16(),))
    refused(found, last(aten.tanh.default), scaled(1.05))


def test_a_dropped_mask() -> None:
    refused(bert(), given(1), constant(1))


def test_dropped_token_types() -> None:
    ids = tokens(2, 8)
    refused(bert(token_type_ids=torch.zeros_like(ids)), given(2), constant(0))


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(1, 6, 6),
        torch.zeros(1, 6, 6).masked_fill(torch.ones(6, 6).triu(1) > 0, -1e4),
        torch.zeros(1, 6, 6).masked_fill(torch.ones(6, 6).triu(1) > 0, NEGATIVE),
        torch.zeros(1, 6, 6, dtype=torch.bool),
        torch.ones(1, 6, 6).triu(1).bool(),
    ],
    ids=["zeros", "-1e4", "smallest", "false", "causal"],
)
def test_a_mask_replaced_by_that_of_the_example(mask: torch.Tensor) -> None:
    found = capture(Additive(), (normal(1, 6, 8), mask), dynamic=False)

    def replaced(edit: Editor, node: fx.Node) -> fx.Node:
        return edit.call(aten.mul.Tensor, edit.weight("example", mask), 1) if mask.is_floating_point() else as_flags(edit)

    def as_flags(edit: Editor) -> fx.Node:
        return edit.call(aten.logical_and.default, edit.weight("example", mask), edit.weight("all", torch.ones_like(mask)))

    refused(found, given(1), replaced)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_first_row_copied_to_all(rows: int) -> None:
    def first(edit: Editor, node: fx.Node) -> fx.Node:
        row = edit.call(aten.slice.Tensor, node, 0, 0, 1)
        return edit.call(aten.expand_as.default, row, node)

    refused(bert(rows), last(aten.layer_norm.default), first)
    found = capture(nn.Linear(8, 4), (normal(rows, 8),))
    refused(found, given(0), first)


def test_causal_attention_that_sees_one_token_too_far() -> None:
    found = capture(Windowed(), (normal(2, 6, 8),))
    refused(found, last(aten.ge.Scalar), lambda edit, node: edit.call(aten.ge.Scalar, node.args[0], -1))


@pytest.mark.parametrize("length", [6, 3], ids=["longer than the window", "four times is longer"])
def test_a_window_that_is_one_short(length: int) -> None:
    found = capture(Windowed(), (normal(2, length, 8),))
    refused(found, last(aten.lt.Scalar), lambda edit, node: edit.call(aten.lt.Scalar, node.args[0], 7))


@pytest.mark.parametrize("threshold", [20, 100, 500])
def test_a_threshold_that_is_never_reached(threshold: int) -> None:
    found = capture(Long(threshold), (normal(2, 6, 8),))
    refused(found, last(aten.where.Scalar), lambda edit, node: edit.call(aten.full_like.default, node, 1.0))


def test_the_one_wrong_pass_of_several_is_named() -> None:
    found = capture(Windowed(), (normal(2, 3, 8),))
    passes = PASSES["merge-common-subexpressions"](), PASSES["raise-softmax"]()
    short = wrong(last(aten.lt.Scalar), lambda edit, node: edit.call(aten.lt.Scalar, node.args[0], 7))
    samples = check_samples(found.program.signature, found.example)
    with pytest.raises(VerifyError, match=r"^wrong was rolled back: its outputs differ"):
        Pipeline([passes[0], short, passes[1]], samples=samples).run(found.program)


def test_the_right_programs_are_not_refused() -> None:
    for found in (bert(), capture(Windowed(), (normal(2, 6, 8),)), capture(seeded(lambda: Masked(-1e30)), (normal(2, 8),))):
        assert run(found, given(0), lambda edit, node: edit.call(aten.mul.Tensor, node, 1)).steps[-1].relative_error == 0


def test_an_output_in_the_memory_of_an_input() -> None:
    class Copies(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    found = capture(Copies(), (normal(2, 8),))
    said = refused(found, last(aten.clone.default), lambda edit, node: edit.call(aten.view_as.default, node.args[0], node))
    assert "output 0 shares memory with input 'x', which it did not before" in said


def test_two_outputs_in_one_memory() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = x * 2
            return y, y.clone()

    found = capture(Twice(), (normal(2, 8),))
    said = refused(found, last(aten.clone.default), lambda edit, node: edit.call(aten.view_as.default, node.args[0], node))
    assert "output 1 shares memory with output 0, which it did not before" in said


def test_memory_read_by_its_strides() -> None:
    class Strided(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 2).as_strided((4, 2), (2, 1))

    def transposed(edit: Editor, node: fx.Node) -> fx.Node:
        turned = edit.call(aten.clone.default, edit.call(aten.t.default, node))
        return edit.call(aten.t.default, edit.call(aten.contiguous.default, turned))

    found = capture(Strided(), (normal(2, 4),), dynamic=False)
    refused(found, last(aten.mul.Tensor), transposed)


def overflowing(edit: Editor, node: fx.Node) -> fx.Node:
    return edit.call(aten.mul.Tensor, edit.call(aten.mul.Tensor, node, 30000.0), 1 / 30000.0)


def test_an_overflow_that_float32_does_not_have_is_refused():
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))).half()
    found = capture(model, (4 * normal(2, 5, 8).half(),))
    refused(found, lambda edit: edit.program.nodes(aten.linear.default)[0], overflowing)
