"""Tests of correct-bias, with the means of what a model's layers give, before and after, as the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.compiler.ir.program import Program
from lissom.errors import RequirementError
from lissom.passes.quantize.correct_bias import CorrectBias
from tests.support import captures
from tests.support.calibrated import MODELS, batches, exact, passed
from tests.support.harness import check_golden, rewrite
from tests.support.models import FeedForward, normal, seeded

aten = torch.ops.aten
SCHEME = "quantize{scheme=int4-weight,group=4}"


def means(program: Program, samples: list[list[torch.Tensor]], mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The mean over real tokens of what every linear layer gives, in the order of the graph."""
    sums: dict[str, list[torch.Tensor]] = {}

    def see(node: torch.fx.Node, value: object) -> None:
        if node.target in (aten.linear.default, aten.addmm.default) and isinstance(value, torch.Tensor):
            rows = value.reshape(-1, value.shape[-1])
            sums.setdefault(node.name, []).append(rows if mask is None or len(rows) != mask.numel() else rows[mask.flatten()])

    with torch.no_grad():
        for sample in samples:
            program.run(sample, see)
    return [torch.cat(found).double().mean(0) for found in sums.values()]


def biased() -> FeedForward:
    """Its inputs have a mean, so that errors of weights do."""
    module = seeded(FeedForward)
    with torch.no_grad():
        module.norm.bias += 2.0
    return module


def test_rewrites() -> None:
    """The layer without a bias gets one."""
    module, x = biased(), normal(6, 5, 8)
    module.down = nn.Linear(12, 8, bias=False)
    found = captures.optimize(module.eval(), x, passes=f"{SCHEME},correct-bias", data=[x])
    check_golden("correct_bias", f"{found.program.text()}\n{found.report.history.steps[-1].summary}\n")


def test_leaves_other_programs_alone() -> None:
    program = exact(MODELS["tiny_bert"])
    after, history = passed(MODELS["tiny_bert"], "correct-bias")
    assert after.text() == program.text()
    assert history.steps[-1].summary == "rewrote 0 of 13; skipped 13: its weight is not quantized (13)"


@pytest.mark.parametrize("scheme", [SCHEME, "quantize{scheme=int8-dynamic,granularity=tensor}"])
def test_numbers(scheme: str) -> None:
    """Every layer gives the mean it gave, and b = b + E[W x] - E[Q(W) x̃] where no layer was corrected before."""
    module, x = biased(), normal(6, 5, 8)
    before = captures.optimize(module, x).program
    rounded = captures.optimize(module, x, passes=scheme, data=[x]).program
    after = captures.optimize(module, x, passes=f"{scheme},correct-bias", data=[x[:2], x[2:]]).program
    wanted, shifted, found = (means(program, [[x]]) for program in (before, rounded, after))
    for one, other in zip(wanted, found, strict=True):
        # Means of 30 float32 values of order 1.
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6)
    bias = module.up.bias.detach().double() + wanted[0] - shifted[0]
    torch.testing.assert_close(after.weight("up.bias").detach().double(), bias, rtol=0, atol=1e-6)
    assert float((wanted[1] - shifted[1]).abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_gpt2", "tiny_llama"])
def test_real_tokens_alone_count(name: str) -> None:
    """On three batches with padding; heads are not treated."""
    passes = "quantize{scheme=int4-weight,group=8},gptq"
    before = exact(MODELS[name])
    after, history = passed(MODELS[name], f"{passes},correct-bias")
    samples = [before.signature.flatten((), batch) for batch in batches()]
    mask = batches()[0]["attention_mask"] != 0
    pairs = list(zip(means(before, samples, mask), means(after, samples, mask), strict=True))
    treated = history.steps[-1].rewritten
    close = [float((one - other).abs().max()) < 1e-5 for one, other in pairs]
    assert treated >= 8 and sum(close) >= treated


def test_rounding_costs_less_after_it() -> None:
    module, x = biased(), normal(6, 5, 8)
    steps = captures.optimize(module, x, passes=f"{SCHEME},correct-bias", data=[x]).report.history.steps
    assert steps[-1].relative_error < steps[-2].relative_error
    # The error that is left is that of single values, which has no mean: 1 - cosine falls to about a quarter.
    assert 1 - steps[-1].cosine < 0.5 * (1 - steps[-2].cosine)


def test_composes() -> None:
    _, history = passed(MODELS["tiny_gpt2"], "smooth-quant,quantize{scheme=int8-static},correct-bias,fold-quantized-weights")
    assert history.steps[-1].relative_error is not None


def test_without_data_it_says_so() -> None:
    with pytest.raises(RequirementError, match="correct-bias needs calibration data: pass data="):
        rewrite(CorrectBias(), seeded(FeedForward), normal(2, 5, 8))
