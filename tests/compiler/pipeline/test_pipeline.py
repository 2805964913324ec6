"""Tests of lissom.compiler.pipeline.pipeline: what runs, what is refused, what is rolled back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import check_samples
from lissom.compiler.pipeline.history import History, Interrupted, Size, Step
from lissom.compiler.pipeline.pass_kinds import Pass, Rewrite
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.errors import BudgetError, LissomError, PassError, RequirementError, UnsupportedError, VerifyError
from lissom.frontends.capture.export import capture
from tests.support.models import capture_of, captured, feed_forward, normal
from tests.support.passes import (
    Calibrates,
    DoubleGelu,
    DoubleState,
    DropDropout,
    Fits,
    IntegerWeights,
    Interrupts,
    Marks,
    NeedsFloats,
    ScaleWeights,
    ShiftsIds,
    StopsHalfway,
    SwapOutputs,
    Untypes,
    WritesInPlace,
)

aten = torch.ops.aten


def run(program: Program, *passes: Pass, name: str = "feed_forward", **options: object) -> tuple[Program, History]:
    samples = check_samples(program.signature, capture_of(name).example)
    return Pipeline(passes, samples=samples, **options).run(program)


def refusal(kind: type[LissomError], program: Program, *passes: Pass, **options: object) -> LissomError:
    """The error a pipeline stops with, which must leave the program's text as it was and hold the history."""
    before = program.text()
    with pytest.raises(kind) as caught:
        run(program, *passes, **options)
    assert program.text() == before
    assert caught.value.history is not None
    return caught.value


def test_passes_run_in_the_order_written():
    _, history = run(captured("feed_forward"), DropDropout(), Marks(), DropDropout())
    assert [step.spelling for step in history.steps] == ["capture", "drop-dropout", "marks", "drop-dropout"]
    assert [step.summary for step in history.steps[1:]] == [
        "rewrote 1 of 2; skipped 1: a norm is no dropout",
        "nothing to do",
        "rewrote 0 of 1; skipped 1: a norm is no dropout",
    ]


def test_the_program_given_is_left_as_it_is():
    program = captured("feed_forward")
    before = program.text()
    after, _ = run(program, DropDropout())
    assert program.text() == before
    assert "dropout" not in after.text().split("return")[0].replace("# dropout", "")


def test_wrong_rewrite_is_rolled_back_naming_first_wrong_node():
    error = refusal(VerifyError, captured("bert"), DropDropout(), DoubleGelu(which=1), name="bert")
    first, *excerpt = str(error).splitlines()
    assert first.startswith("double-gelu{which=1} was rolled back: its outputs differ from the program before by ")
    assert " relative, allowed 2e-05; the first node that differs is 'mul" in first
    assert "(aten.mul.Tensor, in encoder.layer.1.intermediate.intermediate_act_fn, " in first
    assert first.endswith("by 1")
    (marked,) = [line for line in excerpt if line.startswith("  > ")]
    assert "aten.mul.Tensor(%gelu_" in marked
    assert [step.spelling for step in error.history.steps] == ["capture", "drop-dropout"]


def test_wrong_outputs_without_a_wrong_node_are_named():
    error = refusal(VerifyError, captured("feed_forward"), SwapOutputs())
    assert str(error).endswith("; no node that both programs have differs, so the outputs themselves were changed")


def test_a_wrong_state_is_rolled_back():
    error = refusal(VerifyError, captured("counter"), DoubleState(), name="counter")
    assert str(error).startswith("double-state was rolled back: its outputs differ from the program before by 1 relative")
    assert "the first node that differs is 'copy__default' (aten.copy_), by 1" in str(error)


def test_state_is_restored_after_pipeline_and_failure():
    program = captured("counter")
    run(program, DropDropout(), name="counter")
    refusal(VerifyError, program, DoubleState(), name="counter")
    assert program.weight("seen").item() == 0.0


def test_a_malformed_program_is_rolled_back_at_the_node():
    error = refusal(VerifyError, captured("feed_forward"), Untypes())
    assert str(error).startswith("untypes was rolled back: 'gelu' (aten.gelu, models.py:")
    assert "it has no type; make nodes through the editor\n" in str(error)


def test_a_program_that_cannot_run_is_rolled_back():
    error = refusal(VerifyError, captured("tied"), ShiftsIds(), name="tied")
    assert str(error) == (
        "shifts-ids was rolled back: the program does not run after it: IndexError: index out of range in self"
    )
    assert isinstance(error.__cause__, IndexError)


def test_raising_pass_is_named_with_its_current_node():
    program = captured("feed_forward")
    down = program.nodes(aten.linear.default)[1]
    error = refusal(PassError, program, StopsHalfway())
    first, *excerpt = str(error).splitlines()
    assert first == (
        f"stops-halfway failed at 'linear_1' (aten.linear, in down, {nodes.origin(down).source}): "
        f"ZeroDivisionError: division by zero; the program from before the pass is intact"
    )
    assert any(line.startswith("  > %linear_1: ") for line in excerpt)
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_pass_that_writes_into_model_s_weight_is_refused():
    error = refusal(PassError, captured("feed_forward"), WritesInPlace())
    assert str(error).startswith("writes-in-place wrote to the weight 'up.bias' in place, which the program shares with")


def test_an_approximation_reports_its_distance_from_the_original():
    _, history = run(captured("feed_forward"), ScaleWeights(factor=0.5), ScaleWeights(factor=2.0))
    far, near = history.steps[1:]
    assert 0.05 < far.relative_error < 1.0
    assert 0.5 < far.cosine < 1.0
    # Halving and doubling are exact in binary, so the second pass brings the original back.
    assert near.relative_error == 0.0
    # The cosine is computed in float64, unit roundoff 1e-16.
    assert near.cosine == pytest.approx(1.0, abs=1e-12)


def test_a_rewrite_is_compared_with_the_program_before_it():
    _, history = run(captured("feed_forward"), ScaleWeights(factor=0.5), DropDropout())
    assert history.steps[2].relative_error == 0.0
    assert history.steps[2].cosine == history.steps[1].cosine


def test_an_annotation_leaves_every_bit():
    _, history = run(captured("feed_forward"), Marks())
    assert history.steps[1].relative_error == 0.0


def test_an_annotation_that_moves_one_bit_is_refused():
    error = refusal(VerifyError, captured("feed_forward"), Marks(bits=1))
    assert str(error).startswith("marks{bits=1} was rolled back: its outputs differ from the program before by ")
    assert "relative, allowed 0; the first node that differs is 'linear_1' (aten.linear, in down, " in str(error)


def test_training_changes_the_program_and_not_the_model():
    case = feed_forward()
    kept = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    found = capture(case.model, case.args)
    after, history = Pipeline([Fits()], samples=[found.example], data=[found.example]).run(found.program)
    assert history.steps[1].relative_error > 0
    assert all(torch.equal(tensor, kept[name]) for name, tensor in case.model.state_dict().items())
    weights = {name: found.program.weight(name) for name in kept}
    assert all(weight.data_ptr() == case.model.get_parameter(name).data_ptr() for name, weight in weights.items())
    assert not torch.equal(after.weight("up.weight"), kept["up.weight"])


def test_trained_weights_stay_trainable_and_frozen_ones_frozen():
    case = feed_forward()
    case.model.norm.weight.requires_grad_(False)
    found = capture(case.model, case.args)
    after, _ = Pipeline([Fits()], samples=[found.example], data=[found.example]).run(found.program)
    assert [name for name, weight in after.weights().items() if not isinstance(weight, torch.nn.Parameter)] == ["norm.weight"]
    assert not any(weight.requires_grad for weight in after.weights().values())  # a call leaves nothing for a backward pass
    assert torch.equal(after.weight("norm.weight"), case.model.norm.weight)


def test_breach_of_requirement_names_node_pass_and_remedy():
    error = refusal(RequirementError, captured("feed_forward"), IntegerWeights(), NeedsFloats(), checks="off")
    assert str(error) == (
        "needs-floats requires that weights of linear layers are floating point; weight @integers: i8[8, 12] breaks it, "
        "made so by integer-weights: put this pass before the one that quantizes"
    )
    assert [step.spelling for step in error.history.steps] == ["capture", "integer-weights"]


def size_of_output(program: Program) -> float:
    """A score that falls with the weights."""
    return float(program.run([normal(2, 5, 8)])[0].square().mean())


def test_metric_is_measured_after_every_pass_that_changes_it():
    _, history = run(captured("feed_forward"), DropDropout(), ScaleWeights(factor=0.5), metric=size_of_output)
    capture_step, exact, lossy = history.steps
    assert capture_step.metric == exact.metric
    assert lossy.metric < exact.metric


def test_a_drop_within_the_budget_passes():
    _, history = run(captured("feed_forward"), ScaleWeights(factor=0.5), metric=size_of_output, max_drop=1.0)
    assert len(history.steps) == 2


def test_a_drop_over_the_budget_is_rolled_back():
    scores = iter([0.9, 0.7])
    error = refusal(
        BudgetError, captured("feed_forward"), ScaleWeights(factor=0.5), metric=lambda _: next(scores), max_drop=0.05
    )
    assert str(error) == (
        "scale-weights{factor=0.5} was rolled back: it takes the metric from 0.9 to 0.7, a drop of 0.2, allowed 0.05; "
        "make the pass milder or raise max_drop"
    )
    assert len(error.history.steps) == 1


def test_metric_that_is_no_number_is_over_every_budget():
    scores = iter([0.9, float("nan")])
    error = refusal(
        BudgetError, captured("feed_forward"), ScaleWeights(factor=0.5), metric=lambda _: next(scores), max_drop=100.0
    )
    assert "from 0.9 to nan" in str(error)


def test_structural_checks_let_wrong_numbers_pass():
    after, history = run(captured("feed_forward"), DoubleGelu(), checks="structural")
    assert "aten.mul.Tensor(%gelu_1, 2.0)" in after.text()
    assert history.steps[1].relative_error is None


def test_structural_checks_refuse_a_malformed_program():
    refusal(VerifyError, captured("feed_forward"), Untypes(), checks="structural")


def test_with_checks_off_nothing_is_checked():
    after, history = run(captured("feed_forward"), Marks(bits=1), DoubleGelu(), checks="off")
    assert len(history.steps) == 3
    assert {step.cosine for step in history.steps} == {None}
    assert after.nodes(aten.mul.Tensor)


class Counted(TorchDispatchMode):
    """Counts how often a layer norm runs."""

    norms = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.norms += func is aten.native_layer_norm.default
        return func(*args, **(kwargs or {}))


def test_a_pass_that_changes_nothing_costs_no_run():
    with Counted() as counted:
        _, history = run(captured("feed_forward"), NeedsFloats(), NeedsFloats())
    assert counted.norms == 2, "the original on two samples, and nothing else"
    assert [step.relative_error for step in history.steps] == [None, 0.0, 0.0]


class EndsInEveryRow(nn.Module):
    """Wants a 1 in every row, as models that read the place of the last token do."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        torch._assert_async((ids == 1).any(1).all(), "a row has no end")
        return nn.functional.gelu(ids.float())


def test_a_sample_the_original_refuses_is_left_out():
    ids, refused = torch.tensor([[3, 4, 1], [5, 1, 6]]), torch.tensor([[3, 4, 2]])
    program = capture(EndsInEveryRow(), (ids,)).program
    _, history = Pipeline([DropDropout()], samples=[[ids], [refused]]).run(program)
    assert history.steps[1].relative_error == 0
    assert history.steps[0].notes == ("no check on inputs [1, 3], which the model refuses: RuntimeError: a row has no end",)
    with pytest.raises(VerifyError, match="its outputs differ"):
        Pipeline([DoubleGelu()], samples=[[ids], [refused]]).run(program)
    with pytest.raises(VerifyError, match="does not run on the example inputs: RuntimeError: a row has no end"):
        Pipeline([DropDropout()], samples=[[refused], [ids]]).run(program)


class Positions(nn.Module):
    """Takes as many tokens as it has positions: 16."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(16, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found = nn.functional.gelu(x + self.positions(torch.arange(x.shape[1])))
        return found * mask.unsqueeze(-1)


@dataclass(frozen=True)
class DropMask(Rewrite):
    """Wrong: leaves the mask out, which shows where the mask is not all ones."""

    def run(self, edit: Editor) -> None:
        for node in edit.nodes(torch.ops.aten.mul.Tensor):
            edit.replace(node, node.args[0])


def test_inputs_the_model_refuses_are_replaced_by_smaller_ones():
    """The variant of an example with all positions is too long; without another one the mask would be ones everywhere."""
    torch.manual_seed(0)
    found = capture(Positions().eval(), (torch.randn(2, 16, 8), torch.ones(2, 16)))
    with pytest.raises(VerifyError, match="its outputs differ"):
        Pipeline([DropMask()], samples=check_samples(found.program.signature, found.example)).run(found.program)
    program = capture(Positions().eval(), (torch.randn(2, 16, 8), torch.ones(2, 16))).program
    _, history = Pipeline([DropDropout()], samples=check_samples(program.signature, found.example)).run(program)
    (note,) = history.steps[0].notes
    assert note.startswith("no check on inputs [3, 18, 8], [3, 18], which the model refuses: IndexError")
    assert note.endswith("; checked on [3, 16, 8], [3, 16] instead")


def test_an_interrupt_keeps_what_was_finished():
    program = captured("feed_forward")
    before = program.text()
    with pytest.raises(Interrupted, match="interrupted after 2 finished steps") as caught:
        run(program, DropDropout(), Interrupts(), Marks())
    assert [step.spelling for step in caught.value.history.steps] == ["capture", "drop-dropout"]
    assert program.text() == before


def test_interrupt_while_original_is_scored_is_one_too():
    def score(program: Program) -> float:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="interrupted after 0 finished steps"):
        run(captured("feed_forward"), DropDropout(), metric=score)


def test_progress_is_told_before_each_pass():
    told = []
    run(captured("feed_forward"), DropDropout(), ScaleWeights(factor=0.5), progress=lambda *now: told.append(now))
    assert told == [("drop-dropout", 0, 2), ("scale-weights{factor=0.5}", 1, 2)]


def test_a_history_given_goes_on():
    program = captured("feed_forward")
    history = History("drop-dropout", "structural")
    history.record(Step(0, "capture", "capture", 1.5, 0.0, Size.of(program), notes=("a note",)), program.text())
    _, found = Pipeline([DropDropout()], checks="structural").run(program, history)
    assert found is history
    assert [step.index for step in found.steps] == [0, 1]
    assert found.steps[0].notes == ("a note",)
    assert found.steps[0].seconds == 1.5


def test_dead_nodes_and_weights_are_dropped_after_a_pass():
    after, history = run(captured("feed_forward"), StopsShort(), checks="off")
    assert [node.name for node in after.nodes()] == ["dropout"]
    assert after.weights() == {}
    assert (history.steps[1].added, history.steps[1].removed) == (0, 5)


class StopsShort(SwapOutputs):
    """Hands out a dropout of the input itself."""

    def run(self, edit) -> None:
        dropout = edit.program.nodes(aten.dropout.default)[0]
        dropout.args = (edit.program.placeholders[0], *dropout.args[1:])
        super().run(edit)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"checks": "exact"}, "checks='exact' is not known; choose numeric, each, structural, off"),
        ({"checks": "off", "max_drop": 0.1}, "max_drop needs a metric to measure the drop of: pass metric="),
        ({}, "checks='numeric' needs samples to run on; pass samples, or checks='structural'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, reason):
    with pytest.raises(UnsupportedError) as caught:
        Pipeline([], **options)
    assert str(caught.value) == reason


def test_beside_training_passes_calibrate_on_part_of_much_data() -> None:
    data = [[torch.zeros(500, 65, 8)] for _ in range(4)]
    _, history = run(captured("feed_forward"), Calibrates(), Fits(), data=data)
    assert history.steps[-2].notes == ("calibrated on 2 of 4 batches of data=, evenly spaced", "2 batches")
    assert not history.steps[-1].notes
    _, history = run(captured("feed_forward"), Calibrates(), data=data)
    assert history.steps[-1].notes == ("4 batches",)
