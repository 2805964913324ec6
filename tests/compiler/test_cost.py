"""Tests of lissom.compiler.cost, with PyTorch's own counter as the oracle."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lissom.compiler.cost import flops, node_flops
from lissom.frontends.export import capture
from tests.models import CASES, Case, captured, normal, seeded, tokens


def counted(case: Case) -> int:
    """What PyTorch counts; attention as the products it is made of, because its kernel for the CPU goes uncounted there."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        case.model(*case.args, **case.kwargs)
    return counter.get_total_flops()


class Convolutions(nn.Module):
    """A plain, a strided, a grouped and a two-dimensional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv1d(6, 8, 3, padding=1)
        self.strided = nn.Conv1d(8, 4, 5, stride=2)
        self.depthwise = nn.Conv1d(4, 4, 3, groups=4, padding=1)
        self.image = nn.Conv2d(1, 3, (2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.image(self.depthwise(self.strided(self.plain(x))).unsqueeze(1))


class Products(nn.Module):
    """Every spelling of a product of matrices."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.bmm(x, y) + x @ y
        z = torch.baddbmm(z, x, y)
        return z.sum() + torch.addmm(y[0], x[0], y[0]).sum() + torch.mm(x[1], y[1]).sum()


@pytest.mark.parametrize(
    "name", ["feed_forward", "tied", "convolution", "bert", "bert_eager", "llama", "llama_eager", "t5", "gpt2"]
)
def test_operations_are_those_pytorch_counts(name):
    assert flops(captured(name)) == counted(CASES[name]())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 7])
def test_operations_are_counted_at_the_sizes_captured(batch, length):
    case = CASES["bert"]()
    inputs = {"input_ids": tokens(batch, length), "attention_mask": torch.ones(batch, length, dtype=torch.long)}
    program = capture(case.model, (), inputs, dynamic=False).program
    assert flops(program) == counted(Case(case.model, inputs))


@pytest.mark.parametrize(
    "case",
    [
        Case(seeded(Convolutions), (normal(2, 6, 12),)),
        Case(seeded(Products), (normal(2, 4, 4), normal(2, 4, 4))),
    ],
    ids=["convolutions", "products"],
)
def test_operations_of_other_operators_are_those_pytorch_counts(case):
    program = capture(case.model, case.args, dynamic=False).program
    assert flops(program) == counted(case)


def test_a_linear_layer_costs_two_operations_an_element_of_its_matrix_a_row():
    program = captured("feed_forward")
    (linear, _) = program.nodes(torch.ops.aten.linear.default)
    assert node_flops(linear) == 2 * (2 * 5) * (8 * 12)


def test_element_wise_operators_are_free():
    program = captured("feed_forward")
    assert node_flops(program.nodes(torch.ops.aten.gelu.default)[0]) == 0
