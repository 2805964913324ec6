"""`lissom::rotary` against a turn of each pair by hand in float64."""

import math

import pytest
import torch

from lissom.compiler.verify.divergence import relative_error
from lissom.ops import rotary

BATCH, HEADS, TOKENS, WIDTH = 2, 3, 5, 8


def angles():
    """One angle a token and pair."""
    return torch.rand(TOKENS, WIDTH // 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 * math.pi


def by_hand(x, interleaved):
    """Every pair as a complex number, turned by the exponential of its angle."""
    result = x.clone()
    for pair in range(WIDTH // 2):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + WIDTH // 2)
        turned = torch.complex(x[..., a], x[..., b]) * torch.exp(1j * angles()[:, pair])
        result[..., a], result[..., b] = turned.real, turned.imag
    return result


def spread(table, interleaved):
    """A table with one number a pair, as one with a number a feature."""
    return table.repeat_interleave(2, -1) if interleaved else torch.cat([table, table], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_numbers(interleaved, whole):
    x = torch.randn(BATCH, HEADS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cos, sin = angles().cos(), angles().sin()
    if whole:
        cos, sin = spread(cos, interleaved), spread(sin, interleaved)
    # Float64 against float64, two products and a sum.
    assert relative_error(by_hand(x, interleaved), rotary(x, cos, sin, interleaved=interleaved)) < 1e-14


def test_gradients_flow():
    x = torch.randn(1, 1, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotary(x, angles().cos(), angles().sin()), x)


def test_a_table_in_float32_widens_half_precision():
    x = torch.randn(1, 1, TOKENS, WIDTH).bfloat16()
    assert rotary(x, angles().cos().float(), angles().sin().float()).dtype == torch.float32
