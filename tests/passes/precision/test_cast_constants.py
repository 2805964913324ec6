"""Tests of cast: constants beyond the range of the reduced precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lissom
from tests.support.models import normal, seeded

LOWEST = torch.finfo(torch.float32).min


class Filled(nn.Module):
    """Scores that are hidden with a number, as DeBERTa hides them, or with a tensor of one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(8, 8), kind
        self.register_buffer("lowest", torch.full((8,) if kind == "row" else (), LOWEST))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = self.layer(x)
        filled = scores.masked_fill(~mask, LOWEST) if self.kind == "number" else torch.where(mask, scores, self.lowest)
        return torch.softmax(filled, -1)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["number", "scalar", "row"])
def test_a_value_that_hides_stays_finite(kind: str, dtype: str) -> None:
    module, x = seeded(lambda: Filled(kind)), normal(2, 5, 8)
    mask = torch.arange(80).reshape(2, 5, 8) % 3 > 0
    mask[0, 1] = False  # Where everything is hidden, the softmax is uniform, and NaN of infinities.
    fast = lissom.optimize(module, (x, mask), passes=f"cast{{dtype={dtype}}}", data=[(x, mask)]).program
    assert fast.weight("layer.weight_low").dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    # One rounding to 8 bits of scores near 1.
    torch.testing.assert_close(fast(x, mask), module(x, mask), atol=5e-3, rtol=5e-2)


def test_infinity_stays_infinity() -> None:
    module, x = seeded(lambda: Filled("row")), normal(2, 5, 8)
    mask = torch.arange(80).reshape(2, 5, 8) % 3 > 0
    module.lowest.fill_(-torch.inf)
    fast = lissom.optimize(module, (x, mask), passes="cast").program
    assert (fast(x, mask)[~mask] == 0).all()  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("fold", ["", ",fold-quantized-weights"])
def test_scales_of_weights_quantized_before_stay(fold: str, dtype: str) -> None:
    """int4-weight stores its scales in float16; they were cast to float32, and no weight could be folded."""
    module, x = seeded(lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))), normal(3, 32)
    passes = f"quantize{{scheme=int4-weight}}{fold},cast{{dtype={dtype}}},fold-quantized-weights"
    fast = lissom.optimize(module, x, passes=passes, data=[x]).program
    assert "dequantize" in fast.text() and torch.float16 in {weight.dtype for weight in fast.weights().values()}
    whole = lissom.optimize(module, x, passes="quantize{scheme=int4-weight}", data=[x]).program
    # One rounding to 8 bits or more of outputs near 1.
    torch.testing.assert_close(fast(x), whole(x), atol=2e-2, rtol=2e-2)
