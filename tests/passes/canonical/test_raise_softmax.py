"""Tests of raise-softmax."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lissom.backends.base import Backend
from tests.support import captures
from tests.support.harness import Calls, TextCase, aten, calls, check_golden, every_backend, rewrite, text_cases
from tests.support.models import normal

Function = Callable[..., torch.Tensor]

PASSES = "remove-no-ops,merge-common-subexpressions,raise-softmax"


def written_out(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    powers = torch.exp(x - x.max(dim, keepdim=True).values)
    return powers / powers.sum(dim, keepdim=True)


SPELLINGS: dict[str, tuple[Function, int]] = {
    "max": (written_out, -1),
    "amax": (lambda x: (x - x.amax(-1, True)).exp() / (x - x.amax(-1, True)).exp().sum(-1, True), -1),
    "no shift": (lambda x: x.exp() / x.exp().sum(-1, keepdim=True), -1),
    "over the tokens": (lambda x: written_out(x, 1), 1),
}


def oracle(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Each row by itself, in float64."""
    rows = [
        torch.tensor([float(torch.exp(a) / torch.exp(row).sum()) for a in row])
        for row in x.double().movedim(dim, -1).flatten(0, -2)
    ]
    return torch.stack(rows).reshape(x.movedim(dim, -1).shape).movedim(-1, dim)


@pytest.mark.parametrize("name", SPELLINGS)
def test_numbers(name: str) -> None:
    function, dim = SPELLINGS[name]
    x = normal(2, 5, 8)
    program, _ = rewrite(PASSES, Calls(function), x)
    assert (calls(program, aten.softmax.int), calls(program, aten.exp.default)) == (1, 0)
    # An exponential and a sum of eight float32 terms of order 1.
    torch.testing.assert_close(program(x), oracle(x, dim), rtol=0, atol=1e-6)


def test_rewrites() -> None:
    _, history = rewrite(PASSES, Calls(written_out), normal(2, 5, 8))
    check_golden("raise_softmax", history.diff(2, 3))


@text_cases("raise_softmax")
def test_text_cases(text_case: TextCase) -> None:
    text_case.check()


@every_backend
def test_composes(backend: Backend) -> None:
    module = Calls(lambda q, k, v: written_out(q @ k.mT) @ v)
    fast = captures.compile(module, tuple(normal(2, 5, 4, seed=seed) for seed in range(3)), backend=backend)
    assert calls(fast.program, aten.scaled_dot_product_attention.default) == 1
    q, k, v = (normal(3, 7, 4, seed=seed) for seed in range(3, 6))
    # Two sums of a few float32 terms and an exponential.
    torch.testing.assert_close(fast(q, k, v), module(q, k, v), rtol=1e-5, atol=1e-6)
