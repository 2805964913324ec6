"""Lossy passes are undone where they make nothing faster or smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import lissom
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.passes import PASSES

aten = torch.ops.aten


@dataclass(frozen=True)
class Halve(Approximation):
    """Halves the result of every linear layer, at the cost of an operator: lossy, slower and no smaller."""

    def run(self, edit: Editor) -> None:
        for node in edit.nodes(aten.linear.default):
            readers = list(node.users)
            with edit.before(node.next):
                half = edit.call(aten.mul.Tensor, node, 0.5)
            for reader in readers:
                reader.replace_input_with(node, half)
            edit.rewritten += 1


@dataclass(frozen=True)
class Prepare(Halve):
    """The same for the sake of other passes."""

    cheapens: ClassVar[bool] = False


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()


INPUTS = torch.ones(2, 64)


def test_a_pass_that_gains_nothing_is_undone_and_told(model: nn.Module) -> None:
    found = lissom.compile(model, INPUTS, passes=[Halve()])
    torch.testing.assert_close(found(INPUTS), model(INPUTS))
    step = next(step for step in found.report.history.steps if step.spelling == "halve")
    assert step.reverted is not None and step.summary == f"reverted: {step.reverted}"
    assert step.reverted.startswith("neither faster nor smaller on eager: ")
    assert step.reverted.count(" ms and 0.132 MB") == 2
    assert step.reverted.endswith("without, on inputs [2, 64]; only_if_faster=False keeps it")
    assert "halve was reverted: neither faster nor smaller on eager: " in " ".join(str(found.report).split())


def test_it_is_kept_when_asked(model: nn.Module) -> None:
    found = lissom.compile(model, INPUTS, passes=[Halve()], only_if_faster=False)
    assert not torch.allclose(found(INPUTS), model(INPUTS))


def test_what_makes_the_program_smaller_is_kept_without_being_timed(model: nn.Module) -> None:
    found = lissom.compile(model, INPUTS, passes="cast{dtype=bf16}")
    assert all(weight.dtype == torch.bfloat16 for weight in found.program.weights().values())


def test_zeros_count_as_smaller_since_artifacts_leave_them_out(model: nn.Module) -> None:
    found = lissom.compile(model, INPUTS, passes="sparsify{keep=0.25}")
    assert all(step.reverted is None for step in found.report.history.steps)


def test_what_serves_other_passes_is_kept(model: nn.Module) -> None:
    found = lissom.compile(model, INPUTS, passes=[Prepare()])
    assert not torch.allclose(found(INPUTS), model(INPUTS))


def test_exact_passes_behind_it_run_again_and_lossy_ones_go_with_it(model: nn.Module) -> None:
    passes = [Halve(), Prepare(), *parse_pipeline("remove-no-ops", PASSES)]
    found = lissom.compile(model, INPUTS, passes=passes)
    torch.testing.assert_close(found(INPUTS), model(INPUTS))
    steps = [step.spelling for step in found.report.history.steps]
    assert steps[steps.index("halve") :][:3] == ["halve", "prepare", "remove-no-ops"]
    assert found.report.history.steps[steps.index("prepare")].summary == "reverted: it follows halve, which was reverted"
    assert [step.index for step in found.report.history.steps] == list(range(len(steps)))


def test_each_is_judged_by_itself(model: nn.Module) -> None:
    found = lissom.compile(model, INPUTS, passes=[Halve(), *parse_pipeline("cast{dtype=bf16}", PASSES)])
    torch.testing.assert_close(found(INPUTS), model(INPUTS), atol=0.02, rtol=0.02)
    assert all(weight.dtype == torch.bfloat16 for weight in found.program.weights().values())
