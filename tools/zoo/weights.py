"""Random weights that expose mistakes: no zero bias, no unit scale, no layer scaled to nearly zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from tests.support.models import seeded


def woken(build: Callable[[], nn.Module]) -> nn.Module:
    """The module in evaluation mode, with reproducible weights.

    Weights and running statistics that start as a constant get noise. Otherwise a rewrite that lost such a bias, or a branch
    scaled by 1e-5 at the start, would pass every check.
    """
    return seeded(lambda: _wake(build()))


def _wake(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in _weights(model):
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return model


def _weights(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from (buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var")))
