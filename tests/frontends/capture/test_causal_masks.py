"""Tests of masks that PyTorch's transformer modules compare with the causal one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules import transformer

from lissom.frontends.capture.export import capture
from tests.support.models import normal, seeded

WIDTH = 16


def causal(tokens: int) -> torch.Tensor:
    return nn.Transformer.generate_square_subsequent_mask(tokens)


def window(tokens: int) -> torch.Tensor:
    """A causal mask of two tokens."""
    places = torch.ones(tokens, tokens, dtype=torch.bool)
    return torch.zeros(tokens, tokens).masked_fill(places.triu(1) | places.tril(-2), -torch.inf)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, mask)


class Decoder(nn.Module):
    """A decoder over a padded memory."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 32, batch_first=True), 2)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.decoder(x, memory, tgt_mask=mask, memory_key_padding_mask=padding)


class Towers(nn.Module):
    """`nn.Transformer` as in PyTorch's tutorial: the mask is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(WIDTH, 2, 1, 1, 32, batch_first=True)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        tokens = target.shape[1]
        mask = torch.full((tokens, tokens), -torch.inf).triu(1)
        return self.transformer(source, target, tgt_mask=mask)


@pytest.mark.parametrize("example", [causal, window])
def test_an_encoder_applies_any_mask(example) -> None:
    """The values of the example's mask do not get into the program."""
    model = seeded(Encoder).eval()
    found = capture(model, (normal(2, 7, WIDTH), example(7)))
    assert found.program.signature.describe() == "(x: f32[batch, sequence, 16], mask: f32[sequence, sequence])"
    for tokens in (7, 4):
        x = normal(3, tokens, WIDTH, seed=1)
        for mask in (causal(tokens), window(tokens)):
            with torch.no_grad():
                # Float32 products in another order.
                torch.testing.assert_close(found.program(x, mask), model(x, mask), rtol=1e-5, atol=2e-6)


def test_a_decoder_with_a_padded_memory() -> None:
    model = seeded(Decoder).eval()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    program = capture(model, (normal(2, 7, WIDTH), normal(2, 5, WIDTH, seed=1), causal(7), padding)).program
    x, memory, padding = normal(3, 4, WIDTH, seed=2), normal(3, 6, WIDTH, seed=3), torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = True
    with torch.no_grad():
        for mask in (causal(4), window(4)):
            wanted = model(x, memory, mask, padding)
            torch.testing.assert_close(program(x, memory, mask, padding), wanted, rtol=1e-5, atol=2e-6)


def test_a_mask_made_inside() -> None:
    model = seeded(Towers).eval()
    program = capture(model, (normal(2, 7, WIDTH), normal(2, 5, WIDTH, seed=1))).program
    source, target = normal(3, 4, WIDTH, seed=2), normal(3, 6, WIDTH, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(program(source, target), model(source, target), rtol=1e-5, atol=2e-6)


def test_pytorch_compares_masks_again_afterwards() -> None:
    own = transformer._detect_is_causal_mask
    capture(seeded(Encoder).eval(), (normal(2, 7, WIDTH), causal(7)))
    assert transformer._detect_is_causal_mask is own
    assert own(causal(7))
