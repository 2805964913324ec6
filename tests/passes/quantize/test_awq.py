"""Tests of awq, with the search on the values themselves, written out as in the paper, as the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.errors import RequirementError, UnsupportedError
from lissom.passes.quantize.awq import Awq
from tests.support import captures
from tests.support.calibrated import MODELS, passed
from tests.support.harness import check_golden, rewrite
from tests.support.models import FeedForward, normal, seeded


class PreNorm(nn.Module):
    """A norm that two layers read, one channel of it large, another a little."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.left, self.right = nn.LayerNorm(16), nn.Linear(16, 6), nn.Linear(16, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read = self.norm(x)
        return torch.cat([torch.tanh(self.left(read)), torch.tanh(self.right(read))], -1)


def outlying() -> tuple[PreNorm, torch.Tensor]:
    module = seeded(PreNorm)
    with torch.no_grad():
        module.norm.weight[3], module.norm.weight[9] = 40.0, 10.0
    return module, normal(6, 5, 16)


def rounded(weight: torch.Tensor, group: int, low: int, high: int, *, zero_points: bool) -> torch.Tensor:
    """Row by row and group by group, in float64."""
    found = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            piece = weight[row, start : start + group]
            if zero_points:
                least, most = min(0.0, float(piece.min())), max(0.0, float(piece.max()))
                step = (most - least) / (high - low)
                middle = round(-least / step)
            else:
                step, middle = float(piece.abs().max()) / high, 0
            found[row, start : start + group] = ((piece / step).round() + middle).clamp(low, high).sub(middle) * step
    return found


def search(
    weights: list[torch.Tensor], rows: torch.Tensor, group: int, low: int, high: int, *, zero_points: bool
) -> torch.Tensor:
    """The factors with the least squared error of what the layers give, β from 0 to 0.95."""
    size = rows.abs().mean(0)
    best, least = torch.ones_like(size), float("inf")
    for ratio in range(20):
        factors = size.clamp(min=1e-4) ** (ratio / 20)
        factors = factors / (factors.max() * factors.min()).sqrt() if ratio else torch.ones_like(size)
        error = 0.0
        for weight in weights:
            held = rounded(weight * factors, group, low, high, zero_points=zero_points)
            error += float(((rows / factors) @ held.T - rows @ weight.T).square().sum())
        if error < least:
            best, least = factors, error
    return best


def test_rewrites() -> None:
    """Only values change, so the text stays as it is."""
    module, x = outlying()
    found = captures.optimize(module, x, passes="awq{group=8}", data=[x])
    step = found.report.history.steps[-1]
    assert step.relative_error is not None and step.relative_error < 1e-6
    check_golden("awq", f"{found.program.text()}\n{step.summary}\n")


def test_leaves_other_programs_alone() -> None:
    module = seeded(lambda: torch.nn.Linear(8, 8))
    found = captures.optimize(module, normal(2, 8), passes="awq", data=[normal(2, 8)])
    assert found.report.history.diff(0, len(found.report.history.steps) - 1) == ""
    assert torch.equal(found.program.weight("weight"), module.weight)


@pytest.mark.parametrize(
    ("options", "group", "low", "high", "zero_points"),
    [
        ("group=8,symmetric=true", 8, -8, 7, False),
        ("group=4", 4, 0, 15, True),
        ("scheme=int8-weight", 16, -128, 127, False),
        ("granularity=channel,symmetric=true", 16, -8, 7, False),
    ],
)
def test_numbers(options: str, group: int, low: int, high: int, zero_points: bool) -> None:
    module, x = outlying()
    program = captures.optimize(module, x, passes=f"awq{{{options},weight_observer=min-max}}", data=[x[:2], x[2:]]).program
    rows = module.norm(x).detach().reshape(-1, 16).double()
    weights = [module.left.weight.detach().double(), module.right.weight.detach().double()]
    factors = search(weights, rows, group, low, high, zero_points=zero_points)
    assert float(factors.max()) > 1
    for name, weight in zip(("left", "right"), weights, strict=True):
        # Factors of float32 means; another β would be five per cent away.
        torch.testing.assert_close(program.weight(f"{name}.weight").detach().double(), weight * factors, rtol=1e-4, atol=1e-6)
    wanted = module.norm.weight.detach().double() / factors
    torch.testing.assert_close(program.weight("norm.weight").detach().double(), wanted, rtol=1e-4, atol=1e-6)


def test_rounding_costs_less_after_it() -> None:
    module, x = outlying()
    errors = [
        captures.optimize(module, x, passes=passes, data=[x]).report.history.steps[-1].relative_error
        for passes in ("quantize{scheme=int4-weight,group=8}", "awq{group=8},quantize{scheme=int4-weight,group=8}")
    ]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("name", MODELS)
def test_composes(name: str) -> None:
    passes = "awq{group=8,weight_observer=mse},quantize{scheme=int4-weight,group=8,weight_observer=mse},gptq"
    _, history = passed(MODELS[name], f"{passes},fold-quantized-weights")
    step = next(step for step in history.steps if step.spelling.startswith("awq"))
    assert step.relative_error is not None and step.relative_error < 1e-5


def test_without_data_it_says_so() -> None:
    with pytest.raises(RequirementError, match="awq needs calibration data: pass data=, or use equalize"):
        rewrite(Awq(), seeded(FeedForward), normal(2, 5, 8))


def test_a_group_of_none_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="awq takes group= of 1 or more neighbours, not 0"):
        Awq(group=0)
