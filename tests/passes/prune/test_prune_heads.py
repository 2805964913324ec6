"""Tests of prune-heads."""

from __future__ import annotations

import pytest
import torch

from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.transforms.pruning.units import head_sites
from lissom.errors import LissomError, RequirementError, UnsupportedError
from lissom.passes.prune.prune_heads import PruneHeads
from tests.support import captures
from tests.support.harness import check_golden, step_of
from tests.support.models import Case, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

CRITERIA = ("magnitude", "wanda", "gradient", "taylor", "reconstruction", "second-order")
MODELS = {build.__name__: build for build in (tiny_bert, tiny_gpt2, tiny_llama, tiny_t5)}


def dead_units(program: Program) -> list[int]:
    """How many units of each site have nothing but zeros in their columns."""
    found = []
    for site in head_sites(Editor(program, "test")):
        empty = (site.matrix(program) == 0).all(0)
        found.append(int(empty[site.units].all(1).sum()))
    return found


def all_units(program: Program) -> list[int]:
    return [site.count for site in head_sites(Editor(program, "test"))]


def test_rewrites() -> None:
    """Weights change and the form does not: the golden holds what is reported, as there is no difference in the text."""
    case = tiny_bert()
    found = captures.optimize(case.model, case.inputs, passes="prune-heads{keep=0.5}")
    step = step_of(found.report.history, "prune-heads")
    diff = found.report.history.diff(step.index - 1, step.index)
    check_golden("prune_heads", f"{step.spelling}: {step.summary}; difference: {diff or 'none'}\n")


@pytest.mark.parametrize("name", MODELS)
def test_as_many_units_go_as_asked_by_every_criterion(name: str) -> None:
    case: Case = MODELS[name]()
    program = captures.optimize(case.model, case.inputs).program
    data = [program.signature.flatten(case.args, case.kwargs)] * 2
    units = sum(all_units(program))
    for criterion in CRITERIA:
        pipeline = Pipeline([PruneHeads(keep=0.5, criterion=criterion)], data=data, checks="structural")
        found, history = pipeline.run(program)
        assert sum(dead_units(found)) == history.steps[-1].rewritten == units - round(0.5 * units), criterion


def test_magnitude_decides_without_data_and_other_criteria_refuse() -> None:
    case = tiny_bert()
    plain = captures.optimize(case.model, case.inputs, passes="prune-heads{keep=0.5}").program
    named = captures.optimize(case.model, case.inputs, passes="prune-heads{keep=0.5,criterion=magnitude}").program
    assert all(torch.equal(plain.weight(name), named.weight(name)) for name in plain.weights())
    with pytest.raises(RequirementError, match=r"prune-heads\{criterion=wanda\} needs calibration data: pass data="):
        captures.optimize(case.model, case.inputs, passes="prune-heads{keep=0.5,criterion=wanda}")


def test_layer_scope_takes_equal_amounts_except_protected_layers() -> None:
    case = tiny_bert()
    passes = "prune-heads{keep=0.5,scope=layer,protect=encoder.layer.0}"
    first, second = all_units(captures.optimize(case.model, case.inputs).program)
    assert all_units(captures.optimize(case.model, case.inputs, passes=passes).program) == [first, second // 2]


def test_a_share_no_site_can_meet_is_refused() -> None:
    case = tiny_bert()
    with pytest.raises(UnsupportedError, match=r"keep=0.001 leaves 0 of .* heads, but every other site .* give keep="):
        captures.optimize(case.model, case.inputs, passes="prune-heads{keep=0.001}")
    with pytest.raises(LissomError, match="give a fraction above 0 and up to 1"):
        PruneHeads(keep=0.0)


def test_keeping_all_changes_nothing() -> None:
    case = tiny_bert()
    found = captures.optimize(case.model, case.inputs, passes="prune-heads{keep=1.0}", data=[case.inputs])
    step = step_of(found.report.history, "prune-heads")
    assert (step.rewritten, step.relative_error) == (0, 0)


def test_the_model_keeps_its_weights() -> None:
    case = tiny_bert()
    before = {name: weight.clone() for name, weight in case.model.named_parameters()}
    captures.optimize(case.model, case.inputs, passes="prune-heads{keep=0.5}", data=[case.inputs] * 2)
    assert all(torch.equal(weight, before[name]) for name, weight in case.model.named_parameters())


def test_what_is_pruned_is_removed() -> None:
    case = tiny_bert()
    found = captures.optimize(case.model, case.inputs, passes="prune-heads{keep=0.5}", data=[case.inputs] * 2)
    assert all_units(found.program) != all_units(captures.optimize(case.model, case.inputs).program)
    assert sum(dead_units(found.program)) == 0


def test_leaves_other_programs_alone() -> None:
    plain = captures.optimize(torch.nn.Linear(3, 5), torch.randn(2, 3), passes=[PruneHeads(keep=0.5)])
    assert plain.report.history.diff(0, len(plain.report.history.steps) - 1) == ""
