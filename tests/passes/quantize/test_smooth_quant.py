"""Tests of smooth-quant, with the factors of each channel computed one by one as the oracle."""

from __future__ import annotations

import pytest
import torch

from lissom.compiler.ir.program import Program
from lissom.errors import RequirementError, UnsupportedError
from lissom.passes.quantize.smooth_quant import SmoothQuant, smoothing
from tests.support import captures
from tests.support.calibrated import MODELS, exact, passed
from tests.support.harness import check_golden, rewrite
from tests.support.models import FeedForward, normal, seeded


def outlying() -> tuple[FeedForward, torch.Tensor]:
    """A feed-forward whose norm makes two channels that are a hundred times as large as the others, and what it reads."""
    module = seeded(FeedForward)
    with torch.no_grad():
        module.norm.weight[2], module.norm.bias[5] = 100.0, 80.0
    return module, normal(6, 5, 8)


def quantized_error(module: torch.nn.Module, x: torch.Tensor, passes: str) -> float:
    """The largest error on the calibration data, as a share of the largest value."""
    with torch.no_grad():
        wanted, found = module(x), captures.optimize(module, x, passes=passes, data=[x]).program(x)
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_rewrites() -> None:
    """Only values change, so the text stays as it is."""
    module, x = outlying()
    found = captures.optimize(module, x, passes="smooth-quant", data=[x])
    step = found.report.history.steps[-1]
    assert step.relative_error is not None and step.relative_error < 1e-6
    check_golden("smooth_quant", f"{found.program.text()}\n{step.summary}\n")


def test_leaves_other_programs_alone() -> None:
    module = seeded(lambda: torch.nn.Linear(8, 8))
    found = captures.optimize(module, normal(2, 8), passes="smooth-quant", data=[normal(2, 8)])
    assert found.report.history.diff(0, len(found.report.history.steps) - 1) == ""
    assert torch.equal(found.program.weight("weight"), module.weight)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_numbers(alpha: float) -> None:
    module, x = outlying()
    program = captures.optimize(module, x, passes=f"smooth-quant{{alpha={alpha}}}", data=[x[:3], x[3:]]).program
    read = module.norm(x).detach().reshape(-1, 8)
    for channel in range(8):
        largest = max(abs(float(value)) for value in read[:, channel])
        weight = max(abs(float(value)) for value in module.up.weight.detach()[:, channel])
        factor = largest**alpha / weight ** (1 - alpha)
        torch.testing.assert_close(program.weight("norm.weight")[channel], module.norm.weight[channel] / factor)
        torch.testing.assert_close(program.weight("norm.bias")[channel], module.norm.bias[channel] / factor)
        torch.testing.assert_close(program.weight("up.weight")[:, channel], module.up.weight[:, channel] * factor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_scaled_by_powers_of_two(dtype: torch.dtype) -> None:
    """Found by tools/fuzz: weights rounded anew moved outputs by more than two correct programs differ."""
    module, x = outlying()
    module, x = module.to(dtype), x.to(dtype)
    found = captures.optimize(module, x, passes="smooth-quant", data=[x])
    factors = found.program.weight("up.weight").float() / module.up.weight.detach().float()
    assert bool((factors[0] != 1).any())
    assert torch.equal(factors.log2(), factors.log2().round())
    assert torch.equal(found.program(x), module(x))


def test_factor_is_that_of_all_layers_that_read_norm() -> None:
    def weight(program: Program, name: str) -> torch.Tensor:
        return program.weight(f"model.layers.0.{name}.weight").detach()

    before = exact(MODELS["tiny_llama"])
    after, _ = passed(MODELS["tiny_llama"], "smooth-quant{linears=false}")
    factors = weight(before, "input_layernorm") / weight(after, "input_layernorm")
    for name in ("q_proj", "k_proj", "v_proj"):
        wanted = weight(before, f"self_attn.{name}") * factors
        torch.testing.assert_close(weight(after, f"self_attn.{name}"), wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(weight(after, "self_attn.o_proj"), weight(before, "self_attn.o_proj"))


def test_channels_that_are_zero_are_left_alone() -> None:
    found = smoothing(torch.tensor([0.0, 4.0, 2.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert found.tolist() == [1.0, 2.0, 1.0]


def test_rounding_costs_less_after_it() -> None:
    module, x = outlying()
    static = "quantize{scheme=int8-static}"
    assert quantized_error(module, x, f"smooth-quant,{static}") < 0.6 * quantized_error(module, x, static)


@pytest.mark.parametrize("name", MODELS)
def test_composes(name: str) -> None:
    """The exact step is checked by the pipeline; behind it stand rounding, and second-order rounding."""
    _, history = passed(MODELS[name], "smooth-quant,quantize{scheme=int8-static},gptq,fold-quantized-weights")
    smooth = next(step for step in history.steps if step.spelling == "smooth-quant")
    assert smooth.rewritten and smooth.relative_error is not None and smooth.relative_error < 1e-5


def test_patterns_choose_what_makes_the_channels() -> None:
    _, history = passed(MODELS["tiny_llama"], 'smooth-quant{linears=false,skip="*.input_layernorm"}')
    assert history.steps[-1].summary.endswith("skip= names it (2)")
    _, history = passed(MODELS["tiny_llama"], 'smooth-quant{linears=false,only="model.layers.0"}')
    assert history.steps[-1].summary.endswith("only= does not name it (3)")


def test_without_data_it_says_so() -> None:
    with pytest.raises(RequirementError, match="smooth-quant needs calibration data: pass data=, or use equalize"):
        rewrite(SmoothQuant(), seeded(FeedForward), normal(2, 5, 8))


def test_quantized_weights_are_refused() -> None:
    with pytest.raises(RequirementError, match="put this pass before the one that quantizes"):
        passed(MODELS["tiny_bert"], "quantize{scheme=int8-weight},smooth-quant")


def test_an_alpha_out_of_range_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="smooth-quant takes alpha= from 0 to 1, not 2"):
        SmoothQuant(alpha=2.0)
