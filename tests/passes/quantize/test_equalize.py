"""Tests of equalize, with the ranges of the two sides, and the paper's own factors, as the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.errors import RequirementError
from lissom.passes.quantize.equalize import balance
from tests.support import captures
from tests.support.calibrated import MODELS, exact, passed
from tests.support.harness import check_golden, rewrite
from tests.support.models import normal, seeded


def uneven(sizes: tuple[int, ...] = (8, 12, 6)) -> nn.Module:
    module = seeded(lambda: Pair(*sizes))
    with torch.no_grad():
        module.up.weight *= torch.logspace(-1, 1, sizes[1])[:, None]
    return module


class Pair(nn.Module):
    """Up, ReLU, down."""

    def __init__(self, features: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(features, hidden), nn.Linear(hidden, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def test_rewrites() -> None:
    """Only values change, so the text stays as it is."""
    program, history = rewrite("equalize", uneven(), normal(2, 5, 8))
    check_golden("equalize", f"{program.text()}\n{history.steps[1].summary}\n")


def test_leaves_other_programs_alone() -> None:
    module = seeded(lambda: nn.Linear(8, 8))
    program, history = rewrite("equalize", module, normal(2, 8))
    assert history.texts[0] == history.texts[1] and torch.equal(program.weight("weight"), module.weight)


@pytest.mark.parametrize("sizes", [(8, 12, 6), (3, 7, 5)])
def test_numbers(sizes: tuple[int, ...]) -> None:
    """Equation 11, s = √(r₁ r₂) / r₂, channel by channel."""
    module = uneven(sizes)
    program, _ = rewrite("equalize", module, normal(2, 5, sizes[0]))
    for channel in range(sizes[1]):
        r1 = max(abs(float(value)) for value in module.up.weight.detach()[channel])
        r2 = max(abs(float(value)) for value in module.down.weight.detach()[:, channel])
        s = (r1 * r2) ** 0.5 / r2
        torch.testing.assert_close(program.weight("up.weight")[channel], module.up.weight[channel] / s)
        torch.testing.assert_close(program.weight("up.bias")[channel], module.up.bias[channel] / s)
        torch.testing.assert_close(program.weight("down.weight")[:, channel], module.down.weight[:, channel] * s)


def test_both_sides_get_one_range() -> None:
    """Of the values of grouped heads too, which several columns read."""
    program, _ = passed(MODELS["tiny_llama"], "equalize")
    up = program.weight("model.layers.0.mlp.up_proj.weight").abs().amax(1)
    down = program.weight("model.layers.0.mlp.down_proj.weight").abs().amax(0)
    torch.testing.assert_close(up, down, rtol=2e-3, atol=0)
    made = program.weight("model.layers.0.self_attn.v_proj.weight").abs().amax(1).unflatten(0, (2, 4))
    read = program.weight("model.layers.0.self_attn.o_proj.weight").abs().amax(0).unflatten(0, (2, 2, 4)).amax(1)
    torch.testing.assert_close(made, read, rtol=2e-3, atol=0)
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(program.weight(gate), exact(MODELS["tiny_llama"]).weight(gate))


def test_channels_of_zeros_are_left_alone() -> None:
    assert balance(torch.tensor([0.0, 4.0, 2.0]), torch.tensor([1.0, 1.0, 0.0])).tolist() == [1.0, 2.0, 1.0]


def test_rounding_costs_less_after_it() -> None:
    module, x = uneven(), normal(6, 5, 8)
    coarse = "quantize{scheme=int8-weight,granularity=tensor}"
    errors = [
        captures.optimize(module, x, passes=passes).report.history.steps[-1].relative_error
        for passes in (coarse, f"equalize,{coarse}")
    ]
    assert errors[1] < 0.6 * errors[0]


def test_composes() -> None:
    for name in MODELS:
        _, history = passed(MODELS[name], "equalize,smooth-quant,quantize{scheme=int8-dynamic,granularity=tensor}")
        equalized, *_, last = [step for step in history.steps if step.kind == "rewrite"]
        assert equalized.spelling == "equalize" and equalized.rewritten
        assert last.relative_error is not None and last.relative_error < 1e-5


def test_quantized_weights_are_refused() -> None:
    with pytest.raises(RequirementError, match="put this pass before the one that quantizes"):
        passed(MODELS["tiny_bert"], "quantize{scheme=int8-weight},equalize")
