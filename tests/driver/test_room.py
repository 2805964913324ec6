"""The room that a large model takes is estimated for every scheme."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from lissom.driver import room
from lissom.passes.quantize.quantize import Quantize, Scheme


@pytest.mark.parametrize("scheme", ["auto", *(scheme for part in get_args(Scheme) for scheme in get_args(part) or (part,))])
def test_every_scheme_has_its_bits(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "is_large", lambda weights: True)
    weight = nn.Linear(4, 4).requires_grad_(False)
    with room.from_disk(weight, [Quantize(scheme=scheme)]):
        assert torch.isfinite(weight.weight).all()
