"""Tests of lissom.frontends.capture.layers_alike: models compiled from the disk, compared with one layer in all places."""

from __future__ import annotations

import platform
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lissom.compiler import paging
from lissom.compiler.verify.divergence import TOLERANCE, relative_error
from lissom.errors import CaptureError
from lissom.frontends.capture import layers_alike
from lissom.frontends.capture.export import capture
from lissom.frontends.capture.layers_alike import compare_alike
from tests.support.models import normal, seeded

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="models are compiled from the disk on Linux")


class Chain(nn.Module):
    """Twelve layers, of which the first amplifies rounding; in the place of all others, it does so beyond all tolerance."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(12))
        nn.init.normal_(self.layers[0].get_parameter("weight"), std=4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.sin(layer(x))
        return x


def comparisons(monkeypatch: pytest.MonkeyPatch, *, paged: bool, wrong: bool = False) -> list[float]:
    """The errors of a model and its program on inputs that differ by rounding, until `compare_alike` was content."""
    monkeypatch.setattr(paging, "LARGE", 0)
    monkeypatch.setattr(layers_alike, "SPILLED", 1)
    model, x, errors = seeded(Chain), normal(4, 8), list[float]()
    program = capture(model, (x,)).program
    rounded = torch.nextafter(x, torch.full_like(x, torch.inf)) + wrong

    def compare() -> None:
        with torch.no_grad():
            (output,) = program.run([rounded])
            assert isinstance(output, torch.Tensor)
            errors.append(relative_error(model(x), output))
        if errors[-1] > TOLERANCE[torch.float32]:
            raise CaptureError(f"differs by {errors[-1]}")

    with paging.paged(model.parameters()) if paged else nullcontext():
        try:
            compare_alike(model, program, compare)
        except CaptureError:
            errors.append(torch.inf)
    return errors


def test_rounding_that_a_repeated_layer_amplifies_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    alike, own = comparisons(monkeypatch, paged=True)
    assert alike > TOLERANCE[torch.float32] >= own


def test_difference_is_refused_with_the_models_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    *errors, refused = comparisons(monkeypatch, paged=True, wrong=True)
    assert len(errors) == 2
    assert refused == torch.inf


def test_in_memory_a_difference_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    *errors, refused = comparisons(monkeypatch, paged=False, wrong=True)
    assert len(errors) == 1
    assert refused == torch.inf
