"""Tests of prune-neurons."""

from __future__ import annotations

import pytest
import torch

import lissom
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.transforms.pruning.units import neuron_sites
from lissom.errors import LissomError, RequirementError, UnsupportedError
from lissom.passes.prune.prune_neurons import PruneNeurons
from tests.support import captures
from tests.support.harness import check_golden, step_of
from tests.support.mixtures import EXPERTS, HIDDEN, INNER, mixture, samples, stacks
from tests.support.models import Case, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from tests.support.neighbours import all_but_slow

CRITERIA = ("magnitude", "wanda", "gradient", "taylor", "reconstruction", "second-order")
MODELS = {build.__name__: build for build in (tiny_bert, tiny_gpt2, tiny_llama, tiny_t5)}


def dead_units(program: Program) -> list[int]:
    """How many units of each site have nothing but zeros in their columns."""
    found = []
    for site in neuron_sites(Editor(program, "test")):
        empty = (site.matrix(program) == 0).all(0)
        found.append(int(empty[site.units].all(1).sum()))
    return found


def all_units(program: Program) -> list[int]:
    return [site.count for site in neuron_sites(Editor(program, "test"))]


def test_rewrites() -> None:
    """Weights change and the form does not: the golden holds what is reported, as there is no difference in the text."""
    case = tiny_bert()
    found = captures.optimize(case.model, case.inputs, passes="prune-neurons{keep=0.5}")
    step = step_of(found.report.history, "prune-neurons")
    diff = found.report.history.diff(step.index - 1, step.index)
    check_golden("prune_neurons", f"{step.spelling}: {step.summary}; difference: {diff or 'none'}\n")


@pytest.mark.parametrize("name", all_but_slow(MODELS, "tiny_bert", "tiny_gpt2", "tiny_llama"))
def test_as_many_units_go_as_asked_by_every_criterion(name: str) -> None:
    case: Case = MODELS[name]()
    program = captures.optimize(case.model, case.inputs).program
    data = [program.signature.flatten(case.args, case.kwargs)] * 2
    units = sum(all_units(program))
    for criterion in CRITERIA:
        pipeline = Pipeline([PruneNeurons(keep=0.5, criterion=criterion)], data=data, checks="structural")
        found, history = pipeline.run(program)
        assert sum(dead_units(found)) == history.steps[-1].rewritten == units - round(0.5 * units), criterion


def test_magnitude_decides_without_data_and_other_criteria_refuse() -> None:
    case = tiny_bert()
    plain = captures.optimize(case.model, case.inputs, passes="prune-neurons{keep=0.5}").program
    named = captures.optimize(case.model, case.inputs, passes="prune-neurons{keep=0.5,criterion=magnitude}").program
    assert all(torch.equal(plain.weight(name), named.weight(name)) for name in plain.weights())
    with pytest.raises(
        RequirementError, match=r"prune-neurons\{criterion=wanda\} needs calibration data: pass data=, or choose"
    ):
        captures.optimize(case.model, case.inputs, passes="prune-neurons{keep=0.5,criterion=wanda}")


def test_layer_scope_takes_equal_amounts_except_protected_layers() -> None:
    case = tiny_bert()
    passes = "prune-neurons{keep=0.5,scope=layer,protect=encoder.layer.0}"
    first, second = all_units(captures.optimize(case.model, case.inputs).program)
    assert all_units(captures.optimize(case.model, case.inputs, passes=passes).program) == [first, second // 2]


def test_a_share_no_site_can_meet_is_refused() -> None:
    case = tiny_bert()
    with pytest.raises(UnsupportedError, match=r"keep=0.001 leaves 0 of .* neurons, but every other site .* give keep="):
        captures.optimize(case.model, case.inputs, passes="prune-neurons{keep=0.001}")
    with pytest.raises(LissomError, match="give a fraction above 0 and up to 1"):
        PruneNeurons(keep=0.0)


def test_keeping_all_changes_nothing() -> None:
    case = tiny_bert()
    found = captures.optimize(case.model, case.inputs, passes="prune-neurons{keep=1.0}", data=[case.inputs])
    step = step_of(found.report.history, "prune-neurons")
    assert (step.rewritten, step.relative_error) == (0, 0)


def test_the_model_keeps_its_weights() -> None:
    case = tiny_bert()
    before = {name: weight.clone() for name, weight in case.model.named_parameters()}
    captures.optimize(case.model, case.inputs, passes="prune-neurons{keep=0.5}", data=[case.inputs] * 2)
    assert all(torch.equal(weight, before[name]) for name, weight in case.model.named_parameters())


def test_what_is_pruned_is_removed() -> None:
    case = tiny_bert()
    found = captures.optimize(case.model, case.inputs, passes="prune-neurons{keep=0.5}", data=[case.inputs] * 2)
    assert all_units(found.program) != all_units(captures.optimize(case.model, case.inputs).program)
    assert sum(dead_units(found.program)) == 0


def test_leaves_other_programs_alone() -> None:
    plain = captures.optimize(torch.nn.Linear(3, 5), torch.randn(2, 3), passes=[PruneNeurons(keep=0.5)])
    assert plain.report.history.diff(0, len(plain.report.history.steps) - 1) == ""


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_lose_the_same_neurons(name: str, criterion: str) -> None:
    """The experts of a layer share the axis of their neurons."""
    data, passes = samples(), f"prune-neurons{{keep=0.5,criterion={criterion}}}"
    found = captures.optimize(mixture(name), data[0], passes=passes, data=data)
    down, up = (stacks(found.program)[key] for key in sorted(stacks(found.program)))
    assert up.shape == (EXPERTS, INNER, HIDDEN) and down.shape == (EXPERTS, HIDDEN, INNER // 2)


def test_neurons_of_experts_that_are_pruned_are_removed_exactly() -> None:
    data = samples()
    model = mixture("mixtral")
    zeroed = captures.optimize(model, data[0], checks="structural").program.copy()
    name = next(key for key in stacks(zeroed) if "down" in key)
    zeroed.set_weight(name, zeroed.weight(name).detach().index_fill(2, torch.arange(0, INNER, 2), 0.0))
    found = lissom.optimize(zeroed, data[0], passes="eliminate-dead")
    assert [tuple(item.shape) for item in stacks(found.program).values()] == [
        (EXPERTS, INNER, HIDDEN),
        (EXPERTS, HIDDEN, INNER // 2),
    ]
    wanted, given = zeroed.run(list(data[1].values()))[0], found.program.run(list(data[1].values()))[0]
    torch.testing.assert_close(given, wanted)


def test_interleaved_neurons_of_experts_stay_and_are_named() -> None:
    """Gate and up alternate in the projection of GPT-OSS."""
    data = samples()
    found = captures.optimize(mixture("gpt-oss"), data[0], passes="prune-neurons{keep=0.5}", data=data, checks="structural")
    up, down = stacks(found.program).values()
    assert up.shape == (EXPERTS, HIDDEN, 2 * INNER) and down.shape == (EXPERTS, INNER, HIDDEN)
    assert int((down == 0).all(2).all(0).sum()) == INNER // 2
    reasons = [item.reason for item in step_of(found.report.history, "eliminate-dead").skipped]
    assert reasons == ["dead neurons stay: a slice takes one index of each 2 of their axis"]
