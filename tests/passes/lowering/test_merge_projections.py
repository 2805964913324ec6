"""Tests of merge-projections."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lissom.backends.base import Backend
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir.program import Program
from lissom.passes.lowering.merge_projections import MergeProjections
from tests.support import captures
from tests.support.harness import aten, calls, check_golden, every_backend, rewrite
from tests.support.models import normal, seeded, tiny_llama


class Projections(nn.Module):
    """q, k and v, narrower k and v, and a layer of another input."""

    def __init__(self, bias: bool = True, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, size * width, bias=bias) for size in (4, 2, 2))
        self.out = nn.Linear(2 * width, width, bias=bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q(x), self.out(self.k(x) * self.v(x))


def linears(program: Program) -> int:
    return calls(program, aten.linear.default)


def test_rewrites() -> None:
    _, history = rewrite(MergeProjections(always=True), seeded(Projections), normal(2, 5, 8))
    check_golden("merge_projections", history.diff(0, 1))


@pytest.mark.parametrize("bias", [True, False])
def test_numbers(bias: bool) -> None:
    module = seeded(lambda: Projections(bias))
    program, _ = rewrite(MergeProjections(always=True), module, normal(2, 5, 8))
    assert linears(program) == 2
    x = normal(3, 7, 8, seed=1).double()
    wanted = copy.deepcopy(module).double()(x)
    # Sums of up to sixteen float32 products of order 1.
    for left, right in zip(wanted, program(x.float()), strict=True):
        torch.testing.assert_close(right.double(), left, rtol=0, atol=2e-6)


def test_merged_weights_are_concatenated_and_old_ones_go() -> None:
    module = seeded(Projections)
    program, _ = rewrite(MergeProjections(always=True), module, normal(2, 5, 8))
    assert torch.equal(program.weight("merged.weight"), torch.cat([module.q.weight, module.k.weight, module.v.weight]))
    assert set(program.weights()) == {"merged.weight", "merged.bias", "out.weight", "out.bias"}
    assert isinstance(program.weight("merged.bias"), nn.Parameter)


class Shared(nn.Module):
    """The same layer twice, one with a bias beside one without, and a weight with a second reader."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.a(x), self.b(x), self.a(x + 1), self.c(x) @ self.c.weight


def test_leaves_other_graphs_alone() -> None:
    program, history = rewrite(MergeProjections(always=True), seeded(Shared), normal(2, 5, 8))
    assert program.text() == history.texts[0]


def test_measures_by_default_and_says_why_it_stays_apart() -> None:
    module = seeded(lambda: Projections(width=64))
    program, history = rewrite(MergeProjections(), module, normal(2, 5, 64))
    skipped = history.steps[1].skipped
    assert linears(program) == (4 if skipped else 2)
    assert all("merged it takes" in skip.reason and "ms, apart" in skip.reason for skip in skipped)


def test_a_merged_attention_is_seen_as_packed() -> None:
    case = tiny_llama()
    program = captures.optimize(case.model, case.inputs, passes="exact,merge-projections{always=true}").program
    layers = case.model.config.num_hidden_layers
    # q, k and v; their output; gate and up; down.
    assert linears(program) == 4 * layers + (1 if hasattr(case.model, "lm_head") else 0)
    assert all(site.packed for site in program.fact(structure).attention)
    assert len(program.fact(structure).feed_forward) == layers


@every_backend
def test_composes(backend: Backend) -> None:
    module = seeded(Projections)
    fast = captures.compile(module, normal(2, 5, 8), passes="merge-projections{always=true}", backend=backend)
    x = normal(3, 7, 8, seed=1)
    # Sums of up to sixteen products, in another order.
    torch.testing.assert_close(fast(x), module(x), rtol=1e-5, atol=1e-6)


def test_layer_whose_memory_is_read_by_strides_stays_apart() -> None:
    class Windows(nn.Module):
        """Keys in windows that overlap, as Longformer reads them: the strides are those of a result of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            windows = self.k(x).view(6, 8).as_strided((3, 4, 8), (8, 8, 1))
            return self.q(x) @ windows.mT, self.v(x)

    program, history = rewrite(MergeProjections(always=True), seeded(Windows), normal(1, 6, 8))
    assert len(program.nodes(aten.linear.default)) == 2
    # Sums in another order at most.
    assert history.steps[1].relative_error <= 1e-6
