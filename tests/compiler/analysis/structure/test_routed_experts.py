"""Tests of the analysis of routed experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.compiler.analysis.structure.routed_experts import RoutedExperts, dropped_experts, routed_experts
from lissom.ops.grouped_product import grouped_product
from tests.support import captures
from tests.support.mixtures import EXPERTS, MIXTURES, program_of, stacked_products


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_of_a_family(name: str) -> None:
    program = program_of(name)
    ((router, site),) = program.fact(routed_experts)
    assert isinstance(site, RoutedExperts) and site.router is router
    assert (site.experts, site.top_k, site.groups, site.least) == (EXPERTS, 2, 1, 2)
    assert site.products == stacked_products(program)
    # Router and two stacks; a correction bias, or biases of all three.
    assert len(site.stacks) == {"deepseek-v3": 4, "gpt-oss": 6}.get(name, 3)
    assert len(site.masked) == (2 if name == "deepseek-v3" else 1)
    assert not dropped_experts(program, site).any()


class Mixture(nn.Module):
    """A mixture of four experts with one layer each, which may do something with its scores and ids."""

    def __init__(self, extra: str) -> None:
        super().__init__()
        self.extra = extra
        self.router = nn.Linear(6, 4)
        self.experts = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = self.router(x).cumsum(-1) if self.extra == "cumsum" else self.router(x)
        weights, chosen = scores.softmax(-1).topk(2)
        ids, order = chosen.flatten().sort()
        ends = torch.histc(ids.float(), 4, 0, 3).cumsum(0, dtype=torch.int32)
        outputs = grouped_product(x[order // 2], self.experts, ends)
        if self.extra != "unweighted":
            outputs = outputs * weights.flatten()[order].unsqueeze(-1)
        mixed = outputs[order.argsort()].unflatten(0, (-1, 2)).sum(1)
        extras = {"scores": scores, "ids": chosen * 2, "stack": self.experts.sum(0)}
        return (mixed, extras[self.extra]) if self.extra in extras else (mixed,)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("", None),
        ("cumsum", "computes its scores in a way that has no rule"),
        ("unweighted", "the outputs of its experts are not multiplied by the router's weights"),
        ("scores", "the program returns its scores"),
        ("ids", "reads the ids of its experts"),
        ("stack", "the weight 'experts' is read elsewhere too"),
    ],
)
def test_reasons(extra: str, reason: str | None) -> None:
    torch.manual_seed(0)
    program = captures.optimize(Mixture(extra), torch.randn(5, 6), checks="structural").program
    ((_, site),) = program.fact(routed_experts)
    assert isinstance(site, RoutedExperts) if reason is None else reason in str(site)
