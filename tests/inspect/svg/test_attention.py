"""Tests of lissom.inspect.svg.attention: the squares against masks computed from the definition."""

import pytest
import torch

import lissom
from lissom.errors import UnsupportedError
from lissom.inspect.svg.attention import attention_svg
from tests.support.models import seeded
from tests.support.svg_reading import boxes, texts


def program(passes: str, tokens: int = 256):
    model = seeded(lambda: torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True))
    return lissom.optimize(model, torch.randn(1, tokens, 32), passes=passes, checks="structural").program


def test_a_window_is_drawn_as_it_is_defined():
    picture = attention_svg(program("sparsify-attention{pattern=window,window=64}"), tokens=512)
    side = 256 / 8
    left = min(place[0] for _, place in boxes(picture, "seen", "partly"))
    top = min(place[1] for _, place in boxes(picture, "seen", "partly"))
    drawn = torch.zeros(8, 8, dtype=torch.bool)
    for _, (x0, y0, x1, _) in boxes(picture, "seen", "partly"):
        drawn[round((y0 - top) / side), round((x0 - left) / side) : round((x1 - left) / side)] = True
    distance = (torch.arange(512)[:, None] - torch.arange(512)[None]).abs()
    wanted = (distance <= 64).view(8, 64, 8, 64).any(3).any(1)
    assert torch.equal(drawn, wanted) or torch.equal(drawn, (distance < 64).view(8, 64, 8, 64).any(3).any(1))
    share = 100 * float(drawn.float().mean())
    assert any(f"{share:.3g} % of the blocks are seen" in word for word in texts(picture))


def test_a_lowered_program_has_the_same_picture():
    passes = "sparsify-attention{pattern=window,window=64}"
    before = attention_svg(program(passes), tokens=512)
    after = attention_svg(program(f"{passes},lower-sparse-attention"), tokens=512)
    assert boxes(before, "seen", "partly") == boxes(after, "seen", "partly") != []


def test_what_has_no_pattern_is_refused():
    dense = program("exact", 16)
    with pytest.raises(
        UnsupportedError, match=r"no attention in 'TransformerEncoderLayer' has a pattern of positions: .*every key"
    ):
        attention_svg(dense)
    with pytest.raises(UnsupportedError, match=r"has no attention in 'linear1'; its attentions are in"):
        attention_svg(dense, "linear1")
    for tokens in (0, -5):
        with pytest.raises(UnsupportedError, match=rf"a pattern of {tokens} tokens cannot be drawn; give 1 token or more"):
            attention_svg(dense, tokens=tokens)
