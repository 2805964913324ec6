"""Weights that came rounded: quantize finds the grid they lie on, and gives them back to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.ops.quantization import fake_quantize
from tests.support import captures
from tests.support.models import normal, seeded

gguf = pytest.importorskip("gguf")


def test_groups_of_32_give_q8_0_back() -> None:
    """As GGUF files hold embeddings; rounded and turned back here by the package that reads them."""
    kind = gguf.GGMLQuantizationType.Q8_0
    rows = normal(24, 96, seed=3).numpy()
    held = torch.from_numpy(gguf.dequantize(gguf.quantize(rows, kind), kind))
    module = seeded(lambda: nn.Linear(96, 24))
    module.weight = nn.Parameter(held.clone())
    passes = "quantize{scheme=int8-weight,granularity=group,group=32,lm_head=true}"
    program = captures.optimize(module, normal(2, 96), passes=passes).program
    (node,) = program.nodes(fake_quantize)
    scale = program.weight(str(node.args[1].target))
    assert scale.dtype == torch.float16
    assert torch.equal(fake_quantize(held, scale, format="int8"), held)
