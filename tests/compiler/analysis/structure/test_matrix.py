"""Tests of lissom.compiler.analysis.structure.matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lissom
from lissom.compiler.analysis.structure.linear import is_linear
from lissom.compiler.analysis.structure.matrix import Matrix, matrix_of, readers_of
from lissom.compiler.ir.editor import Editor
from tests.support import captures
from tests.support.mixtures import EXPERTS, HIDDEN, INNER, MIXTURES, program_of, stacked_products
from tests.support.models import captured, normal, seeded
from tests.support.neighbours import all_but_slow


class Products(nn.Module):
    """One matrix each way round, one through views, one cut, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.turned = nn.Parameter(normal(3, 4)), nn.Parameter(normal(4, 3))
        self.whole = nn.Parameter(normal(4, 6))
        self.convolution = nn.Conv1d(2, 2, 1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [
            nn.functional.linear(x, self.plain),
            x @ self.turned,
            x @ self.plain.t(),
            x @ self.whole[:, :3],
            self.convolution(x),
        ]


def test_matrices_are_features_out_by_features_in():
    module, x = seeded(Products), normal(2, 4)
    program = lissom.frontends.capture.export.capture(module, (x,), {}, dynamic=False).program
    found = [matrix_of(node) for node in program.nodes() if is_linear(node)]
    assert [item.transposed if isinstance(item, Matrix) else item for item in found] == [
        False,
        True,
        False,
        "its weight is split, cast or reshaped before it is used",
        "it is a convolution or a batched matrix product",
    ]
    for item in found[:3]:
        assert item.read(program).shape == (3, 4)
    assert len(readers_of(found[0].node)) == 2


def test_what_is_written_is_read_back_and_counts():
    program = captured("gpt2")
    layer = next(node for node in program.nodes() if is_linear(node))
    matrix, edit = matrix_of(layer), Editor(program, "test")
    wanted = normal(48, 16)
    matrix.write(edit, wanted)
    assert torch.equal(matrix.read(program), wanted)
    assert program.weight(matrix.name).shape == (16, 48) and program.weight(matrix.name).is_contiguous()
    assert edit.rewritten == 1


@pytest.mark.parametrize("name", all_but_slow(MIXTURES, "mixtral", "qwen3-moe"))
def test_experts_have_a_stack_of_matrices(name: str) -> None:
    program = program_of(name)
    up, down = stacked_products(program)
    assert matrix_of(up) == matrix_of(down) == "its weight is a stack of the matrices of several experts"
    matrices = [matrix_of(node, stacks=True) for node in (up, down)]
    assert all(isinstance(item, Matrix) and item.transposed == (name == "gpt-oss") for item in matrices)
    assert [item.shape for item in matrices] == [(2 * INNER, HIDDEN), (HIDDEN, INNER)]
    for matrix in matrices:
        whole, edit = matrix.read(program), Editor(program, "test")
        assert whole.shape == (EXPERTS, *matrix.shape)
        expert = program.weight(matrix.name)[1]
        assert torch.equal(whole[1], expert.T if matrix.transposed else expert)
        matrix.write(edit, whole * 2)
        assert torch.equal(matrix.read(program), whole * 2) and program.weight(matrix.name).is_contiguous()


class Selected(nn.Module):
    """Two matrices of a stack, each selected by its index."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(normal(2, 3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.experts[0]) * nn.functional.linear(x, self.experts[1])


def test_matrix_selected_from_stack_has_no_matrix_itself() -> None:
    program = captures.optimize(seeded(Selected), (normal(2, 4),)).program
    layers = [node for node in program.nodes() if is_linear(node)]
    reason = "its weight is split, cast or reshaped before it is used"
    assert [matrix_of(node, stacks=True) for node in layers] == [reason, reason]
