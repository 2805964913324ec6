"""Decoders that keep keys and values in buffers, and the calls that fill them: what the tests of state share."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.backends.onnxruntime.session import Session
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.driver.options import resolve_passes
from lissom.frontends.capture.export import Capture, capture
from tests.support.models import VOCABULARY, seeded, tokens

PLACES = 24
"""How many tokens a cache holds."""
WIDTH, HEADS, GROUPS = 32, 4, 2
HEAD_DIM = WIDTH // HEADS
TOKENS = Dim("tokens", max=PLACES)
DYNAMIC = {"input_ids": {1: TOKENS}, "position_ids": {1: TOKENS}}


class Layer(nn.Module):
    """Grouped-query attention over a cache, and a feed-forward, each behind a norm and added back."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEAD_DIM * heads, bias=False) for heads in (HEADS, GROUPS, GROUPS))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.register_buffer("keys", torch.zeros(batch, GROUPS, PLACES, HEAD_DIM))
        self.register_buffer("values", torch.zeros(batch, GROUPS, PLACES, HEAD_DIM))

    def forward(self, x: torch.Tensor, mask: torch.Tensor, places: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        q, k, v = (item(h).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for item in (self.q, self.k, self.v))
        q, k = (item * angles.cos() + torch.cat((-item[..., 4:], item[..., :4]), -1) * angles.sin() for item in (q, k))
        self.keys.index_copy_(2, places, k)
        self.values.index_copy_(2, places, v)
        found = functional.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=True)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class Decoder(nn.Module):
    """Two layers with caches. padded: the mask hides padding too. window: how many places back a token sees; 0 for all.

    consecutive: tokens go to the places behind `start`, [1]; otherwise `start` has a place for each, [tokens].
    """

    def __init__(self, batch: int = 2, padded: bool = True, window: int = 0, consecutive: bool = True) -> None:
        super().__init__()
        self.padded, self.window, self.consecutive = padded, window, consecutive
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(batch) for _ in range(2))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)

    def mask(self, places: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[1 or batch, 1, tokens, places]: True where a token sees a place."""
        all_places = torch.arange(PLACES)
        seen = all_places <= places[:, None]
        if self.window:
            seen = seen & (all_places > places[:, None] - self.window)
        return seen[None, None] & attention_mask[:, None, None].bool() if self.padded else seen[None, None]

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, start: torch.Tensor
    ) -> torch.Tensor:
        places = torch.arange(input_ids.shape[1]) + start if self.consecutive else start
        mask = self.mask(places, attention_mask)
        angles = position_ids[..., None] / 100 ** (torch.arange(4) / 4)
        angles = torch.cat((angles, angles), -1)[:, None]
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, mask, places, angles)
        return self.norm(x) @ self.embedding.weight.T


def captured_decoder(model: nn.Module, batch: int, consecutive: bool = True) -> Capture:
    """A decoder as a program in canonical form, for any number of tokens, with an example of five behind two."""
    dynamic = DYNAMIC if consecutive else DYNAMIC | {"start": {0: TOKENS}}
    found = capture(model, call_of(2, 5, batch, consecutive=consecutive), dynamic=dynamic)
    pipeline = Pipeline(resolve_passes("exact"), checks="structural")
    return Capture(pipeline.run(found.program)[0], found.example, found.notes, found.seconds)


def decoder(batch: int = 2, padded: bool = True, window: int = 0, consecutive: bool = True) -> Capture:
    """A `Decoder` captured, once a session."""
    return _decoder(batch, padded, window, consecutive)


@cache
def _decoder(batch: int, padded: bool, window: int, consecutive: bool) -> Capture:
    return captured_decoder(seeded(lambda: Decoder(batch, padded, window, consecutive)), batch, consecutive)


def decoder_session(batch: int = 2, consecutive: bool = True) -> Session:
    """A `Decoder` in a session of ONNX Runtime, built once a session of tests: put its state back."""
    return _decoder_session(batch, consecutive)


@cache
def _decoder_session(batch: int, consecutive: bool) -> Session:
    found = decoder(batch, consecutive=consecutive)
    built = OnnxRuntime(timing_seconds=0).build(found.program, found.example)
    assert isinstance(built, Session)
    return built


def call_of(start: int, count: int, batch: int = 2, padding: int = 1, consecutive: bool = True) -> Sample:
    """A call with so many tokens behind the first `start`; the last sequence begins with padding."""
    places = torch.arange(start, start + count)
    attention_mask = torch.ones(batch, PLACES, dtype=torch.int64)
    attention_mask[-1, :padding] = 0
    ids = tokens(batch, count, seed=start)
    return [ids, attention_mask, places.repeat(batch, 1), places[:1] if consecutive else places]


def generation(batch: int = 2, padding: int = 3, consecutive: bool = True) -> list[Sample]:
    """A prompt of 7 tokens, 10 tokens one by one, and 3 more at once."""
    counts = [7, *[1] * 10, 3]
    return [call_of(sum(counts[:index]), count, batch, padding, consecutive) for index, count in enumerate(counts)]
