"""`lissom::attention` against loops in float64."""

import math

import pytest
import torch

from lissom.compiler.verify.divergence import relative_error
from lissom.ops import attention


def by_hand(q, k, v, bias, scale, softcap, sinks):
    """One score, one exponential and one sum at a time."""
    batch, heads, queries, _ = q.shape
    result = torch.zeros(batch, heads, queries, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                scores = [float(q[b, h, i] @ k[b, h, j]) * scale for j in range(k.shape[2])]
                scores = [softcap * math.tanh(score / softcap) if softcap else score for score in scores]
                scores = [score + float(bias[i, j]) for j, score in enumerate(scores)]
                weights = [math.exp(score) for score in scores]
                total = sum(weights) + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
                result[b, h, i] = sum(weight / total * v[b, h, j] for j, weight in enumerate(weights))
    return result


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 5)])
def test_numbers(softcap, with_sinks, queries, keys):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (queries, keys, keys))
    bias = torch.randn(queries, keys, generator=generator, dtype=torch.float64)
    sinks = torch.randn(3, generator=generator, dtype=torch.float64) if with_sinks else None
    logits = None if sinks is None else sinks[None, :, None, None]
    found = attention(q, k, v, bias, scale=0.7, softcap=softcap, sinks=logits)
    # Float64 against float64 in another order of summation.
    assert relative_error(by_hand(q, k, v, bias, 0.7, softcap, sinks), found) < 1e-12


def test_a_boolean_mask_says_what_is_seen():
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind(0)
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=0.5)
    # Two float32 kernels.
    assert relative_error(wanted, attention(q, k, v, seen, scale=0.5)) < 2e-6


@pytest.mark.parametrize("form", ["flags", "numbers"])
def test_a_query_that_sees_nothing_is_given_zeros(form):
    """Found by tools/fuzz: it was NaN here, and zeros in the kernels and in PyTorch's attention."""
    q, k, v = torch.randn(3, 2, 2, 4, 8).unbind(0)
    seen = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    seen[1, :, 2] = False
    bias = seen if form == "flags" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    found = attention(q, k, v, bias, scale=0.5)
    assert torch.equal(found[1, :, 2], torch.zeros(2, 8))
    assert relative_error(torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=0.5), found) < 2e-6


def test_a_bias_that_is_nan_gives_nan():
    q, k, v = torch.randn(3, 1, 2, 4, 8).unbind(0)
    bias = torch.zeros(4, 4)
    bias[1] = torch.nan
    found = attention(q, k, v, bias, scale=0.5)
    assert bool(found[:, :, 1].isnan().all())
    assert not bool(found[:, :, [0, 2, 3]].isnan().any())


@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradients(with_sinks):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 4, generator=generator, dtype=torch.float64, requires_grad=True) for n in (3, 5, 5))
    bias = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(1, 2, 1, 1, generator=generator, dtype=torch.float64, requires_grad=True) if with_sinks else None
    # Central differences of 1e-6 in float64, along a random direction: errors of some 1e-9.
    assert torch.autograd.gradcheck(
        lambda *given: attention(*given[:4], scale=0.7, softcap=3.0, sinks=given[4] if with_sinks else None),
        (q, k, v, bias, *([sinks] if with_sinks else [])),
        atol=1e-7,
        rtol=1e-5,
        fast_mode=True,
    )
