"""What raise-attention leaves alone, and the reason it gives."""

from __future__ import annotations

import torch
from torch import nn

from tests.passes.canonical.raise_attention.test_raise_attention import PASSES, tensors
from tests.support.harness import Calls, TextCase, rewrite, text_cases


def test_a_learned_temperature_is_refused() -> None:
    module = Calls(lambda model, q, k, v: (q @ k.mT * model.t).softmax(-1) @ v, t=nn.Parameter(torch.tensor(0.5)))
    _, history = rewrite(PASSES, module, *tensors())
    assert history.steps[-1].skipped[0].reason == "the scores come through aten.mul.Tensor"


@text_cases("raise_attention")
def test_text_cases(text_case: TextCase) -> None:
    text_case.check()
