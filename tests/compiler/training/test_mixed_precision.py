"""Tests of the calls that a training step with products in half precision computes in float32."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional

from lissom.compiler.training.mixed_precision import SHORT, rms_norm, short_attention
from tests.support.models import normal


def gradients(attend, tokens: int, mask: torch.Tensor | None, autocast: bool) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value, in bfloat16 as a linear layer gives them under autocast."""
    read = [normal(2, 3, tokens, 8, seed=seed).bfloat16().requires_grad_() for seed in range(3)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend(*read, mask)
    found.float().square().sum().backward()
    return [found, *(item.grad for item in read)]


@pytest.mark.parametrize("mask", [None, torch.ones(2, 1, 5, 5).tril().bool(), torch.ones(2, 1, 5, 5).tril().sub(1).mul(1e4)])
def test_few_tokens_are_attended_in_float32(mask: torch.Tensor | None) -> None:
    found = gradients(short_attention, 5, mask, autocast=True)
    read = [normal(2, 3, 5, 8, seed=seed).bfloat16().float().requires_grad_() for seed in range(3)]
    exact = functional.scaled_dot_product_attention(*read, mask)
    exact.square().sum().backward()
    assert found[0].dtype == torch.float32 and torch.equal(found[0], exact)
    for gradient, item in zip(found[1:], read, strict=True):
        assert gradient.dtype == torch.bfloat16 and torch.equal(gradient, item.grad.bfloat16())


@pytest.mark.parametrize(("tokens", "autocast"), [(SHORT, True), (5, False)])
def test_others_are_attended_as_pytorch_does(tokens: int, autocast: bool) -> None:
    found = gradients(short_attention, tokens, None, autocast)
    exact = gradients(functional.scaled_dot_product_attention, tokens, None, autocast)
    assert found[0].dtype == torch.bfloat16 and all(map(torch.equal, found, exact))


@pytest.mark.parametrize("weight", [None, normal(8, seed=1)])
def test_norms_use_weights_dtype_without_warnings(weight: torch.Tensor | None, capfd) -> None:
    x = normal(2, 5, 8).bfloat16()
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("error")
            found = rms_norm(x, [8], weight, 1e-6)
    finally:
        torch.set_warn_always(before)
    assert capfd.readouterr().err == ""
    assert torch.equal(found, functional.rms_norm(x if weight is None else x.float(), [8], weight, 1e-6))
    assert found.dtype == (torch.bfloat16 if weight is None else torch.float32)
