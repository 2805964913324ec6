"""Small models as users write them: the ways of spelling a layer that published models do not cover."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from tests.support.models import Case, normal
from tools.zoo import users_attention as attention
from tools.zoo import users_networks as networks
from tools.zoo.entry import Entry, Expected
from tools.zoo.users_attention import HEAD_DIM, HEADS, HIDDEN, LAYERS, VOCABULARY, WIDTH, Encoder, FeedForward
from tools.zoo.weights import woken

PADDING = 1
"""The token of padding in translations."""


class Sinusoidal(nn.Module):
    """PyTorch's tutorial: an encoder in [tokens, batch, width] with a table of positions computed in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.2), LAYERS)

    def forward(self, src: torch.Tensor) -> torch.Tensor:
        x = self.embedding(src) * math.sqrt(WIDTH)
        position = torch.arange(src.size(0), device=src.device).unsqueeze(1)
        frequencies = torch.exp(torch.arange(0, WIDTH, 2, device=src.device) * (-math.log(10000.0) / WIDTH))
        table = torch.zeros(src.size(0), 1, WIDTH, device=src.device)
        table[:, 0, 0::2] = torch.sin(position * frequencies)
        table[:, 0, 1::2] = torch.cos(position * frequencies)
        mask = nn.Transformer.generate_square_subsequent_mask(len(src))
        return self.decoder(self.encoder(x + table, mask))


class Seq2Seq(nn.Module):
    """nn.Transformer with the masks of PyTorch's translation tutorial, made from the tokens."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.src, self.tgt = (nn.Embedding(VOCABULARY, WIDTH, padding_idx=PADDING) for _ in range(2))
        self.transformer = nn.Transformer(WIDTH, HEADS, LAYERS, LAYERS, HIDDEN, batch_first=True, **options)
        self.generator = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, src: torch.Tensor, tgt: torch.Tensor) -> torch.Tensor:
        length = tgt.shape[1]
        tgt_mask = torch.triu(torch.ones(length, length, device=tgt.device), diagonal=1).bool()
        src_mask = torch.zeros(src.shape[1], src.shape[1], device=src.device).type(torch.bool)
        padded, tgt_padded = src == PADDING, tgt == PADDING
        out = self.transformer(
            self.src(src), self.tgt(tgt), src_mask, tgt_mask, None, padded, tgt_padded, memory_key_padding_mask=padded
        )
        return self.generator(out)


class DecoderOnly(nn.Module):
    """nn.TransformerDecoder over memory, with a mask for each."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, norm_first=True, activation=functional.gelu)
        self.decoder = nn.TransformerDecoder(layer, LAYERS, nn.LayerNorm(WIDTH))

    def forward(self, tgt: torch.Tensor, memory: torch.Tensor, memory_padding: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1], device=tgt.device)
        return self.decoder(tgt, memory, tgt_mask=mask, memory_key_padding_mask=memory_padding, tgt_is_causal=True)


class CrossAttention(nn.Module):
    """nn.MultiheadAttention with keys and values of other widths, and learned keys and values appended."""

    def __init__(self, bias_kv: bool) -> None:
        super().__init__()
        options = {"add_bias_kv": True, "add_zero_attn": True} if bias_kv else {}
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=20, vdim=12, batch_first=True, **options)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, weights = self.attention(x, keys, values, average_attn_weights=False)
        return self.norm(x + y), weights


class Recurrent(nn.Module):
    """A convolution, a recurrent layer, self-attention, and a classifier of the last token."""

    def __init__(self, kind: type[nn.GRU | nn.LSTM], bidirectional: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, WIDTH, 3, padding=1)
        self.rnn = kind(WIDTH, WIDTH // (2 if bidirectional else 1), batch_first=True, bidirectional=bidirectional)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)
        self.fc = nn.Linear(WIDTH, 7)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.conv(features.transpose(1, 2))).transpose(1, 2)
        return self.fc(self.layer(self.rnn(x)[0])[:, -1])


class Resampler(nn.Module):
    """A number of queries read every image; batch and length come from len(x) and x.shape, as in Qwen-VL's resampler."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.kv_proj = nn.Parameter(torch.randn(5, WIDTH)), nn.Linear(24, WIDTH, bias=False)
        self.attn, self.ln_q, self.ln_kv = nn.MultiheadAttention(WIDTH, HEADS), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, WIDTH) * WIDTH**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kv = self.ln_kv(self.kv_proj(x)).permute(1, 0, 2)
        query = self.ln_q(self.query).unsqueeze(1).repeat(1, len(x), 1)
        return self.attn(query, kv, kv)[0].permute(1, 0, 2) @ self.proj


class CrossEncoder(Encoder):
    """Pairs of texts with token types; the score is of the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.types, self.pooler, self.classifier = nn.Embedding(2, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        x = self.tokens(input_ids) + self.types(token_type_ids)
        for layer in self.layers:
            x = layer["norm1"](x + layer["attn"](x, attention_mask))
            x = layer["norm2"](x + layer["mlp"](x))
        logits = self.classifier(torch.tanh(self.pooler(x[:, 0]))).squeeze(-1)
        return {"logits": logits, "scores": logits.sigmoid()}


class Pooled(Encoder):
    """Rows of one vector: a reward of the last real token, a mean over real tokens, or a normalized embedding."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.score = how, nn.Linear(WIDTH, 1, bias=False)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(ids, attention_mask)
        if self.how == "reward":
            last = attention_mask.long().sum(1) - 1
            return self.score(hidden)[torch.arange(len(ids), device=ids.device), last]
        weights = attention_mask.unsqueeze(-1).expand(hidden.size()).float()
        mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return mean if self.how == "mean" else functional.normalize(mean, p=2, dim=1)


class Batch(Encoder):
    """One dict as argument, and a dict as output."""

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        hidden = self.hidden(batch["input_ids"], batch["attention_mask"])
        return {"logits": self.head(hidden), "last_hidden_state": hidden}


class AddedMask(nn.Module):
    """A mask [batch, 1, tokens, tokens] as an argument, of floats that are added or of booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), FeedForward()

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (attention.heads_of(part) for part in self.qkv(x).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class VisionTransformer(nn.Module):
    """Names and layers of torchvision: encoder_layer_0 with self_attention and mlp, and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_proj, self.class_token = nn.Conv2d(3, WIDTH, 4, stride=4), nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embedding = nn.Parameter(torch.randn(1, 5, WIDTH) * 0.02)
        layers = OrderedDict((f"encoder_layer_{index}", VisionBlock()) for index in range(LAYERS))
        self.layers, self.ln = nn.Sequential(layers), nn.LayerNorm(WIDTH)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(WIDTH, 10)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        n = pixels.shape[0]
        x = self.conv_proj(pixels).reshape(n, WIDTH, -1).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1) + self.pos_embedding
        return self.heads(self.ln(self.layers(x))[:, 0])


class VisionBlock(nn.Module):
    """One layer of VisionTransformer."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(0.1), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def _ids(seed: int = 0, length: int = 12) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def _padded(seed: int = 0, length: int = 12) -> torch.Tensor:
    """Token ids with padding at the end of the second row."""
    ids = _ids(seed, length)
    ids[1, -3:] = PADDING
    return ids


def _mask(length: int = 12) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, -4:] = False
    return mask


def _encoder(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> Case:
    model = woken(build)
    return Case(model if dtype == torch.float32 else model.to(dtype), {"ids": _ids(), "attention_mask": _mask()})


def _given(build: Callable[[], nn.Module], *inputs: object) -> Case:
    return Case(woken(build), inputs)


def _parametrized(wrap: Callable[[nn.Linear], nn.Module]) -> Callable[[int, int], nn.Module]:
    return lambda inputs, outputs: wrap(nn.Linear(inputs, outputs))


def _encoders() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Encoders of token ids and a mask, by name."""
    with_attention: dict[str, Callable[[], nn.Module]] = {
        "einops": attention.Rearranged,
        "einops-qkv-last": partial(attention.Rearranged, last=True),
        "complex-rotary": attention.ComplexRotary,
        "complex-rotary-computed": partial(attention.ComplexRotary, computed=True),
        "alibi": attention.Alibi,
        "alibi-causal": partial(attention.Alibi, causal=True),
        "head-norms": attention.NormedHeads,
        "latent-attention": attention.Latent,
        "lora-merged": partial(attention.Lora, merged=True),
        "lora-unmerged": partial(attention.Lora, merged=False),
        "multihead-attention": attention.MultiheadAttention,
        "multihead-attention-weights": partial(attention.MultiheadAttention, weights=True),
        "multihead-attention-rows": partial(attention.MultiheadAttention, rows=True),
        "multihead-attention-tokens-first": partial(attention.MultiheadAttention, batch_first=False),
        "multihead-attention-bias-kv": partial(attention.MultiheadAttention, add_bias_kv=True, add_zero_attn=True),
    }
    with_feed_forward: dict[str, Callable[[], nn.Module]] = {
        **{f"gated-{kind}": partial(attention.Gated, kind) for kind in ("separate", "gate-last", "interleaved")},
        **{f"experts-{kind}": partial(networks.Experts, kind) for kind in ("loop", "indices", "stacked")},
        "weight-norm": partial(FeedForward, _parametrized(parametrizations.weight_norm)),
        "spectral-norm": partial(FeedForward, _parametrized(parametrizations.spectral_norm)),
        "int8-weights": partial(FeedForward, attention.Int8Linear),
        "fake-quantized": partial(FeedForward, attention.FakeQuantLinear),
    }
    yield from ((name, partial(Encoder, build)) for name, build in with_attention.items())
    yield from ((name, partial(Encoder, feed_forward=build)) for name, build in with_feed_forward.items())
    for spelling in ("rsqrt", "norm", "normalize", "sqrt"):
        yield f"rms-{spelling}", partial(Encoder, norm=partial(attention.RMSNorm, spelling))
    yield "parallel", partial(Encoder, parallel=True)
    yield "tied", partial(Encoder, tied=True)
    yield "dataclass-outputs", networks.DataclassOutputs
    yield "hooked-features", networks.Collecting
    yield "assigned-table", partial(networks.Assigning, averages=False)
    yield "assigned-average", partial(networks.Assigning, averages=True)
    yield from ((name, partial(Pooled, name)) for name in ("reward", "mean", "normalized"))


def _others() -> Iterator[tuple[str, Callable[[], Case], Expected]]:
    """Models with other inputs, by name."""
    usual, vectors, images = _LAYERS, normal(2, 12, WIDTH), normal(2, 3, 32, 32)
    floats = torch.zeros(2, 1, 12, 12).masked_fill(~_mask()[:, None, None, :], float("-inf"))
    past = [(normal(2, HEADS, 5, HEAD_DIM, seed=seed), normal(2, HEADS, 5, HEAD_DIM, seed=seed + 9)) for seed in range(LAYERS)]
    pair = {"input_ids": _ids(), "attention_mask": _mask(), "token_type_ids": (torch.arange(12) > 5).long().expand(2, -1)}
    translated = Expected(3 * LAYERS, HEADS, HEADS, HEAD_DIM, 2 * LAYERS)
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        yield name, partial(_encoder, Encoder, dtype), usual
    for flash in (False, True):
        yield "nanogpt-flash" if flash else "nanogpt", partial(_given, partial(networks.NanoGPT, flash), _ids()), usual
    yield "swin", partial(_given, networks.Swin, images), usual
    yield "conformer", partial(_given, networks.Conformer, normal(2, 20, 16)), Expected(1, HEADS, HEADS, HEAD_DIM, 2)
    yield "perceiver", partial(_given, networks.Perceiver, normal(2, 12, 20), _mask()), Expected(1, HEADS, HEADS, HEAD_DIM, 1)
    yield "cache-argument", partial(_given, networks.Cached, _ids(length=3), past), usual
    yield "sinusoidal", partial(_given, Sinusoidal, _ids().T.contiguous()), usual
    for order in (False, True):
        name = "translation-norm-first" if order else "translation"
        yield name, partial(_given, partial(Seq2Seq, norm_first=order), _padded(), _padded(1, 9)), translated
    yield (
        "decoder",
        partial(_given, DecoderOnly, vectors, normal(2, 7, WIDTH), ~_mask(7)),
        Expected(2 * LAYERS, HEADS, HEADS, HEAD_DIM, LAYERS),
    )
    for bias_kv in (False, True):
        name = "cross-attention-bias-kv" if bias_kv else "cross-attention"
        yield name, partial(_given, partial(CrossAttention, bias_kv), vectors, normal(2, 9, 20), normal(2, 9, 12)), Expected(1)
    one = Expected(1, HEADS, HEADS, HEAD_DIM, 1)
    for name, kind, both in (("gru", nn.GRU, False), ("lstm", nn.LSTM, False), ("lstm-bidirectional", nn.LSTM, True)):
        yield name, partial(_given, partial(Recurrent, kind, both), normal(2, 12, 16)), one
    yield "resampler", partial(_given, Resampler, normal(2, 9, 24)), Expected(1, HEADS, HEADS, HEAD_DIM, 0)
    yield "cross-encoder", lambda: Case(woken(CrossEncoder), pair), usual
    yield "dict", partial(_given, Batch, {"input_ids": _ids(), "attention_mask": _mask()}), usual
    yield "mask-floats", partial(_given, AddedMask, vectors, floats), one
    yield "mask-booleans", partial(_given, AddedMask, vectors, floats == 0), one
    yield "torchvision-names", partial(_given, VisionTransformer, normal(2, 3, 8, 8)), usual


_LAYERS = Expected(LAYERS, HEADS, HEADS, HEAD_DIM, LAYERS)
# A mixture of separate layers has a site for each expert, and one of stacked weights a site for all.
_EXPERTS = Expected(LAYERS, HEADS, HEADS, HEAD_DIM, 4 * LAYERS)
_SIZES = {
    **dict.fromkeys(("complex-rotary", "complex-rotary-computed"), Expected(LAYERS, HEADS, HEADS // 2, HEAD_DIM, LAYERS)),
    **dict.fromkeys(("experts-loop", "experts-indices"), _EXPERTS),
    "latent-attention": Expected(LAYERS, HEADS, HEADS, HEAD_DIM + attention.Latent.ROTARY, LAYERS),
}


def entries() -> Iterator[Entry]:
    """Every model of a user's kind."""
    for name, build in _encoders():
        yield Entry(f"hand-written/{name}", "hand-written", partial(_encoder, build), partial(_same, _SIZES.get(name, _LAYERS)))
    for name, make, expected in _others():
        yield Entry(f"hand-written/{name}", "hand-written", make, partial(_same, expected))


def _same(expected: Expected) -> Expected:
    return expected
