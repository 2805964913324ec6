"""The room that a large model takes is estimated for every scheme."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from lissom.driver import room
from lissom.frontends.checkpoints.stored_weights import PackedWeight, keep_stored
from lissom.ops.gguf_blocks import StoredBlocks
from lissom.passes.quantize.quantize import Quantize, Scheme


def test_stored_weights_take_the_bits_of_their_format() -> None:
    linear = nn.Linear(4, 4)
    assert room._stored_bits(linear) == 6.5
    blocks = StoredBlocks(torch.zeros(4, 4, dtype=torch.int8), torch.ones(4, 1), None, "int8")
    keep_stored(linear.weight, PackedWeight("int8 per channel", "int8", 4, 4, lambda: blocks))
    assert room._stored_bits(linear) == 8.5


@pytest.mark.parametrize("scheme", ["auto", *(scheme for part in get_args(Scheme) for scheme in get_args(part) or (part,))])
def test_every_scheme_has_its_bits(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "is_large", lambda weights: True)
    weight = nn.Linear(4, 4).requires_grad_(False)
    with room.from_disk(weight, [Quantize(scheme=scheme)]):
        assert torch.isfinite(weight.weight).all()
