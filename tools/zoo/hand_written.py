"""Hand-written models: one small decoder with many attention implementations, and PyTorch's own transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tests.support.models import Case, normal
from tools.zoo.entry import Entry, Expected
from tools.zoo.weights import woken

WIDTH, HEADS, HEAD_DIM, HIDDEN, LAYERS, VOCABULARY, POSITIONS = 32, 4, 8, 80, 2, 61, 64


def _causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


class PackedEinsum(nn.Module):
    """One layer for q, k and v, and einsum for both products; the mask is a buffer, as in nanoGPT."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", _causal(POSITIONS)[None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (part.view(batch, length, HEADS, HEAD_DIM) for part in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (1.0 / math.sqrt(HEAD_DIM))
        scores = scores.masked_fill(~self.bias[:, :, :length, :length], float("-inf"))
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return self.c_proj(y.reshape(batch, length, width))


class FoldedBaddbmm(nn.Module):
    """Batch and heads folded into one dimension, and baddbmm to add a bias per distance, as in BLOOM."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, HEADS + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        packed = self.query_key_value(x).view(batch, length, HEADS, 3, HEAD_DIM)
        q, k, v = (packed[..., index, :].transpose(1, 2).reshape(batch * HEADS, length, HEAD_DIM) for index in range(3))
        distance = torch.arange(length, device=x.device, dtype=x.dtype)
        alibi = (self.slopes[:, None, None] * distance[None, None, :]).repeat(batch, 1, 1)
        scores = torch.baddbmm(alibi, q, k.transpose(1, 2), beta=1.0, alpha=HEAD_DIM**-0.5)
        scores = scores.view(batch, HEADS, length, length)
        future = torch.full((length, length), torch.finfo(x.dtype).min, device=x.device).triu(1)
        weights = (scores + future).softmax(-1).view(batch * HEADS, length, length)
        y = torch.bmm(weights, v).view(batch, HEADS, length, HEAD_DIM)
        return self.dense(y.transpose(1, 2).reshape(batch, length, width))


class Unpacked(nn.Module):
    """q, k and v from one layer, separated by chunk, split or unbind; PyTorch's attention operator."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        packed = self.qkv(x)
        if self.how == "chunk":
            q, k, v = (part.view(batch, length, HEADS, HEAD_DIM).transpose(1, 2) for part in packed.chunk(3, -1))
        elif self.how == "split":
            split = packed.view(batch, length, HEADS, 3 * HEAD_DIM).split([HEAD_DIM] * 3, -1)
            q, k, v = (part.transpose(1, 2) for part in split)
        else:
            q, k, v = packed.reshape(batch, length, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class MultiQuery(nn.Module):
    """Four query heads that share one key and value head, which broadcasts."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * HEAD_DIM)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2)
        k, v = (part.unsqueeze(1) for part in self.kv(x).chunk(2, -1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(HEAD_DIM)
        weights = scores.masked_fill(~_causal(length).to(x.device), -1e30).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Sinks(nn.Module):
    """A learnt logit per head that takes part in the softmax and is dropped after it, as in GPT-OSS."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (layer(x).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) * HEAD_DIM**-0.5
        scores = scores + torch.full((length, length), -torch.inf, device=x.device).triu(1)
        sinks = self.sinks.view(1, HEADS, 1, 1).expand(batch, -1, length, -1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Softcap(nn.Module):
    """Scores held inside ±20 by tanh before the mask, as in Gemma 2, and grouped key and value heads repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, WIDTH // 2, bias=False) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2)
        k, v = (layer(x).view(batch, length, HEADS // 2, HEAD_DIM).transpose(1, 2) for layer in (self.k, self.v))
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
        scores = torch.tanh(q @ k.transpose(2, 3) * HEAD_DIM**-0.5 / 20.0) * 20.0
        weights = (scores + torch.full((length, length), -1e9, device=x.device).triu(1)).softmax(-1, dtype=torch.float32)
        return self.out((weights.type_as(v) @ v).transpose(1, 2).reshape(batch, length, width))


class WrittenSoftmax(nn.Module):
    """Softmax without a softmax operator: exponentials over their sum, after subtracting the largest score."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (layer(x).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(HEAD_DIM)
        scores = torch.where(_causal(length).to(x.device), scores, torch.tensor(-1e4))
        exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = exponentials / exponentials.sum(-1, keepdim=True)
        return self.out(torch.matmul(weights, v).transpose(1, 2).reshape(batch, length, width))


class PerHead(nn.Module):
    """A loop over heads with separate layers, as in a tutorial; the scores are scaled after the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, HEAD_DIM, bias=False) for _ in "qkv") for _ in range(HEADS))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        outputs = []
        for query, key, value in self.heads:
            scores = query(x) @ key(x).transpose(-2, -1)
            scores = scores.masked_fill(~_causal(length).to(x.device), float("-inf")) * HEAD_DIM**-0.5
            outputs.append(functional.softmax(scores, dim=-1) @ value(x))
        return self.proj(torch.cat(outputs, dim=-1))


class PlainWeights(nn.Module):
    """No linear layers: weights of shape [width, heads, head_dim] in einsum, as in JAX code."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(WIDTH, HEADS, HEAD_DIM) * 0.1) for _ in range(3))
        self.wo = nn.Parameter(torch.randn(HEADS, HEAD_DIM, WIDTH) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum("btw,whd->bthd", x, weight) for weight in (self.wq, self.wk, self.wv))
        logits = torch.einsum("bthd,bshd->bhts", q / HEAD_DIM**0.5, k)
        logits = torch.where(_causal(x.shape[1]).to(x.device), logits, torch.finfo(x.dtype).min)
        return torch.einsum("bhts,bshd,hdw->btw", logits.softmax(-1), v, self.wo)


class FeedForward(nn.Module):
    """Gelu, or a gated unit with gate and value from one layer, separated by chunk."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.up = nn.Linear(WIDTH, 2 * HIDDEN if gated else HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        if not self.gated:
            return self.down(functional.gelu(hidden, approximate="tanh"))
        gate, value = hidden.chunk(2, dim=-1)
        return self.down(functional.silu(gate) * value)


class Decoder(nn.Module):
    """Embeddings, layers of attention and feed-forward, and a head."""

    def __init__(self, attention: Callable[[], nn.Module], gated: bool = False, parallel: bool = False) -> None:
        super().__init__()
        self.parallel = parallel
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.attention = nn.ModuleList(attention() for _ in range(LAYERS))
        self.feed_forward = nn.ModuleList(FeedForward(gated) for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2)) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for attention, feed_forward, (first, second) in zip(self.attention, self.feed_forward, self.norms, strict=True):
            if self.parallel:
                x = x + attention(first(x)) + feed_forward(first(x))
                continue
            x = x + attention(first(x))
            x = x + feed_forward(second(x))
        return self.head(self.norm(x))


class Translator(nn.Module):
    """PyTorch's nn.Transformer on embedded tokens, with the causal mask it makes itself."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(WIDTH, HEADS, LAYERS, LAYERS, HIDDEN, batch_first=True, **options)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True)


class PaddedEncoder(nn.Module):
    """PyTorch's nn.TransformerEncoder with padding masked out."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, activation="gelu", **options)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


def _ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))


def _decoder(attention: Callable[[], nn.Module], **options: bool) -> Case:
    return Case(woken(lambda: Decoder(attention, **options)), (_ids(),))


def _translator() -> Case:
    return Case(woken(Translator), {"source": _ids(), "target": _ids(1)})


def _padded_encoder(**options: bool) -> Case:
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[1, -4:] = True
    return Case(woken(lambda: PaddedEncoder(**options)), {"x": normal(2, 12, WIDTH), "padding": padding})


def entries() -> Iterator[Entry]:
    """The decoder with each attention implementation, then PyTorch's own modules."""
    usual = Expected(LAYERS, HEADS, HEADS, HEAD_DIM, LAYERS)
    decoders: dict[str, tuple[Callable[[], Case], Expected]] = {
        "packed-einsum": (partial(_decoder, PackedEinsum), usual),
        "folded-baddbmm": (partial(_decoder, FoldedBaddbmm), usual),
        "chunk": (partial(_decoder, partial(Unpacked, "chunk"), gated=True), usual),
        "split": (partial(_decoder, partial(Unpacked, "split")), usual),
        "unbind": (partial(_decoder, partial(Unpacked, "unbind"), parallel=True), usual),
        "multi-query": (partial(_decoder, MultiQuery), Expected(LAYERS, HEADS, 1, HEAD_DIM, LAYERS)),
        "sinks": (partial(_decoder, Sinks, gated=True), usual),
        "softcap": (partial(_decoder, Softcap, gated=True), Expected(LAYERS, HEADS, HEADS // 2, HEAD_DIM, LAYERS)),
        "written-softmax": (partial(_decoder, WrittenSoftmax), usual),
        "per-head": (partial(_decoder, PerHead), Expected(None, None, None, HEAD_DIM, LAYERS)),
        "plain-weights": (partial(_decoder, PlainWeights), usual),
        "nn-transformer": (_translator, Expected(3 * LAYERS, HEADS, HEADS, HEAD_DIM, 2 * LAYERS)),
        "nn-transformer-encoder": (_padded_encoder, usual),
        "nn-transformer-encoder-norm-first": (partial(_padded_encoder, norm_first=True), usual),
    }
    for name, (build, expected) in decoders.items():
        yield Entry(f"hand-written/{name}", "hand-written", build, partial(_same, expected))


def _same(expected: Expected) -> Expected:
    return expected
