"""Tests of PyTorch's encoders, which write zeros at padding positions, but not while they are traced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lissom
from lissom.errors import CaptureError
from lissom.frontends.capture.export import capture
from tests.support.models import normal, seeded
from tests.support.neighbours import all_but_slow

WIDTH = 16
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def masks(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Padding masks of every form, true at padding."""
    found = {
        name: torch.zeros(rows, tokens, dtype=torch.bool) for name in ("none", "end", "end and hole", "start", "whole row")
    }
    found["end"][-1, tokens // 2 :] = True
    found["end and hole"][-1, tokens // 2 :] = True
    found["end and hole"][0, 1] = True
    found["start"][0, :2] = True
    found["whole row"][0] = True
    return found


class Encoder(nn.Module):
    """An encoder whose output is read at padding positions too."""

    def __init__(self, *, norm: bool = True, pooled: bool = False, mask_check: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH) if norm else None, mask_check=mask_check)
        self.pooled = pooled

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        found = self.encoder(x, src_key_padding_mask=padding)
        return found.mean(1) if self.pooled else found


EXAMPLES = [(pooled, example) for pooled in (False, True) for example in ("none", "end", "end and hole")]


@pytest.mark.parametrize(("pooled", "example"), all_but_slow(EXAMPLES, (True, "none"), (False, "end and hole")))
def test_padding_positions_hold_what_the_model_writes(pooled: bool, example: str) -> None:
    model = seeded(lambda: Encoder(pooled=pooled)).eval()
    program = capture(model, (normal(2, 7, WIDTH), masks(2, 7)[example])).program
    for rows, tokens in ((2, 7), (3, 5)):
        x = normal(rows, tokens, WIDTH, seed=1)
        for mask in masks(rows, tokens).values():
            with torch.no_grad():
                wanted = model(x, mask)
                found = program(x, mask)
            # Float32 products in another order.
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


def test_an_additive_mask() -> None:
    model = seeded(Encoder).eval()
    additive = torch.zeros(2, 7).masked_fill(masks(2, 7)["end"], -torch.inf)
    program = capture(model, (normal(2, 7, WIDTH), torch.zeros(2, 7))).program
    with torch.no_grad():
        torch.testing.assert_close(
            program(normal(2, 7, WIDTH), additive), model(normal(2, 7, WIDTH), additive), rtol=1e-5, atol=2e-6
        )


def test_encoder_that_does_not_check_its_mask_is_refused() -> None:
    """It leaves tokens out at other places than where the mask has padding, as its documentation says."""
    model = seeded(lambda: Encoder(mask_check=False)).eval()
    with pytest.raises(CaptureError, match="on inputs with other values or masks than those of the example"):
        capture(model, (normal(2, 7, WIDTH), masks(2, 7)["none"]))


def test_a_compiled_encoder_pools_as_the_model_does() -> None:
    model = seeded(lambda: Encoder(norm=False, pooled=True)).eval()
    fast = lissom.compile(model, (normal(1, 7, WIDTH), masks(1, 7)["none"]))
    x, mask = normal(3, 9, WIDTH, seed=1), masks(3, 9)["end"]
    with torch.no_grad():
        torch.testing.assert_close(fast(x, mask), model(x, mask), rtol=1e-5, atol=2e-6)


class Sized(nn.TransformerEncoder):
    """A subclass that changes only how it is made."""

    def __init__(self) -> None:
        super().__init__(nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True), 2)


def assert_captured_with_padding(model: nn.Module) -> None:
    """Captured without padding, it gives what the model gives with some."""
    program = capture(model, (normal(2, 7, WIDTH), masks(2, 7)["none"])).program
    x, mask = normal(2, 7, WIDTH, seed=1), masks(2, 7)["end"]
    with torch.no_grad():
        # Float32 products in another order.
        torch.testing.assert_close(program(x, mask), model(x, mask), rtol=1e-5, atol=2e-6)


def test_a_subclass_with_pytorch_s_forward() -> None:
    model = seeded(Encoder).eval()
    model.encoder = seeded(Sized).eval()
    assert_captured_with_padding(model)


def test_a_replaced_forward_is_kept() -> None:
    model = seeded(Encoder).eval()
    own = model.encoder.layers[0]
    model.encoder.forward = lambda src, src_key_padding_mask: own(src) * src_key_padding_mask[..., None]
    assert_captured_with_padding(model)
