"""What raise-attention leaves alone, and the reason it gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.passes.canonical.raise_attention.raise_attention import RaiseAttention
from tests.models import normal
from tests.passes.canonical.raise_attention.test_raise_attention import LOWEST, PASSES, SIZE, Function, plain, tensors
from tests.passes.harness import Calls, rewrite


def with_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


REFUSALS: dict[str, tuple[Function, str]] = {
    "weights returned": (with_weights, "the attention weights have readers other than the product with v"),
    "fill of -10000": (
        lambda q, k, v: (q @ k.mT).masked_fill(k[:, :, None, :, 0] > 0, -1e4).softmax(-1) @ v,
        "a fill of -10000 is not low enough to be the same as adding it",
    ),
    "fill that is computed": (
        lambda q, k, v: (q @ k.mT).masked_fill(k[:, :, None, :, 0] > 0, q.sum()).softmax(-1) @ v,
        "the fill of the masked scores is computed",
    ),
    "fill turned upside down": (
        lambda q, k, v: (-1.0 * (q @ k.mT).masked_fill(k[:, :, None, :, 0] > 9, LOWEST)).softmax(-1) @ v,
        f"a fill of {-LOWEST:g} is not low enough to be the same as adding it",
    ),
    "soft cap after a mask": (
        lambda q, k, v: (torch.tanh(q @ k.mT + k[:, :, None, :, 0]) * 30).softmax(-1) @ v,
        "the scores are soft-capped after a bias, a shift or another cap",
    ),
    "sinks kept": (
        lambda q, k, v: torch.cat([q @ k.mT, q[..., :1]], -1).softmax(-1) @ torch.cat([v, v[:, :, :1]], 2),
        "the last column is dropped from the weights, or sinks are kept in them",
    ),
    "last key dropped": (
        lambda q, k, v: (q @ k.mT).softmax(-1)[..., :-1] @ v[:, :, :-1],
        "the last column is dropped from the weights, or sinks are kept in them",
    ),
    "two columns joined": (
        lambda q, k, v: torch.cat([q @ k.mT, q[..., :2]], -1).softmax(-1)[..., :-1] @ torch.cat([v, v[:, :, :1]], 2),
        "the scores are joined with something that is not one column of sinks",
    ),
    "weights put to 0": (
        lambda q, k, v: (q @ k.mT).softmax(-1).masked_fill(k[:, :, None, :, 0] > 0, 0.0) @ v,
        "the weights are set to 0 where the scores are not masked",
    ),
    "sum with a factor": (
        lambda q, k, v: torch.add(q @ k.mT, k[:, :, None, :, 0], alpha=2).softmax(-1) @ v,
        "the scores are added with a factor",
    ),
    "softmax over the queries": (lambda q, k, v: (q @ k.mT).softmax(2) @ v, "the softmax is not over the last dimension"),
    "division by zero": (lambda q, k, v: (q @ k.mT / 0.0).softmax(-1) @ v, "the scores come through aten.div.Tensor"),
    "scores given": (lambda q, k, v: q.softmax(-1) @ k[:, :, :SIZE], "the scores are an input"),
    "one matrix": (lambda q, k, v: plain(q[0, 0], k[0, 0], v[0, 0]), "q, k and v have ranks [2]; attention takes 4, or 3"),
}


@pytest.mark.parametrize("function, reason", REFUSALS.values(), ids=REFUSALS)
def test_refuses(function: Function, reason: str) -> None:
    program, history = rewrite(RaiseAttention(), Calls(function), *tensors())
    assert program.text() == history.texts[0]
    assert [skip.reason for skip in history.steps[1].skipped] == [reason]


def test_a_learned_temperature_is_refused() -> None:
    module = Calls(lambda model, q, k, v: (q @ k.mT * model.t).softmax(-1) @ v, t=nn.Parameter(torch.tensor(0.5)))
    _, history = rewrite(PASSES, module, *tensors())
    assert history.steps[-1].skipped[0].reason == "the scores come through aten.mul.Tensor"


def test_a_softmax_that_is_no_attention_is_left_alone() -> None:
    def route(x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        weights, chosen = (x @ experts).softmax(-1).topk(2, -1)
        return weights * chosen

    program, history = rewrite(RaiseAttention(), Calls(route), normal(2, 5, 8), normal(2, 8, 4))
    assert program.text() == history.texts[0]
    assert history.steps[1].summary == "nothing to do"
