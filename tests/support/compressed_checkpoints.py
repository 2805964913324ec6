"""Programs of a small decoder, as exports to compressed-tensors take them."""

from __future__ import annotations

from typing import Any

import torch

import lissom
from lissom.api import Optimized
from tests.support.quantized_checkpoints import small_config, small_model

IDS = torch.arange(3, 27).view(2, 12)


def optimized(passes: str, model: Any = None, ids: torch.Tensor = IDS) -> Optimized:
    inputs = {"input_ids": ids}
    model = small_model(small_config()).float() if model is None else model
    return lissom.optimize(model, inputs, passes=passes, data=[inputs], checks="off")
