from __future__ import annotations

import torch
from torch import nn

from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.passes.canonical.eliminate_dead_code import EliminateDeadCode
from tests.support.harness import TextCase, apply, aten, calls, capture_model, check_golden, rewrite, text_cases
from tests.support.models import normal, seeded
from tests.support.written_attention import compiled


class Unread(nn.Module):
    """Computes a branch nothing reads, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(4, 4)
        self.unread = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unread(x).relu().sum(-1)
        return self.read(x)


def append(program: Program, target: torch._ops.OpOverload, *args: object) -> None:
    """Put a call nothing reads at the end of the program."""
    edit = Editor(program, "test")
    with edit.before(program.output):
        edit.call(target, *args)


def test_rewrites() -> None:
    _, history = rewrite(EliminateDeadCode(), seeded(Unread), normal(2, 5, 4))
    check_golden("eliminate_dead_code", history.diff(0, 1))


def test_leaves_other_graphs_alone() -> None:
    module = nn.Linear(4, 4)
    program, history = rewrite(EliminateDeadCode(), module, normal(2, 5, 4))
    assert program.text() == history.texts[0]
    assert history.steps[1].summary == "nothing to do"


def test_numbers() -> None:
    module = seeded(Unread)
    program, _ = rewrite(EliminateDeadCode(), module, normal(2, 5, 4))
    for shape in ((1, 1, 4), (3, 7, 4)):
        x = normal(*shape, seed=1)
        wanted = x.double() @ module.read.weight.T.double() + module.read.bias.double()
        # Sums of five float32 terms of order 1: a few roundings of 6e-8.
        torch.testing.assert_close(program(x).double(), wanted, rtol=0, atol=1e-6)


def test_weight_nothing_reads_leaves_program_and_stays_in_model() -> None:
    module = seeded(Unread)
    program, _ = rewrite(EliminateDeadCode(), module, normal(2, 5, 4))
    assert set(program.weights()) == {"read.weight", "read.bias"}
    assert module.unread.weight.shape == (4, 4)


def test_a_check_that_returns_nothing_stays() -> None:
    found = capture_model(nn.Linear(4, 4), normal(2, 5, 4))
    append(found.program, aten._assert_tensor_metadata.default, found.program.placeholders[0])
    program, _ = apply(EliminateDeadCode(), found.program, found.example)
    assert calls(program, aten._assert_tensor_metadata.default) == 1


def test_a_dead_random_number_goes() -> None:
    found = capture_model(nn.Linear(4, 4), normal(2, 5, 4))
    append(found.program, aten.rand_like.default, found.program.placeholders[0])
    program, history = apply(EliminateDeadCode(), found.program, found.example)
    assert calls(program, aten.rand_like.default) == 0
    assert history.steps[1].rewritten == 1


@text_cases("eliminate_dead_code")
def test_text_cases(text_case: TextCase) -> None:
    text_case.check()


def test_composes() -> None:
    program = compiled("bert").program
    again, history = Pipeline([EliminateDeadCode()], checks="off").run(program)
    assert again.text() == program.text()
    assert history.steps[1].summary == "nothing to do"
