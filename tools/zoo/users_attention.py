"""Attention and feed-forward layers of users' own models, and one encoder that takes any of them.

Every attention takes hidden states [batch, tokens, width] and a mask [batch, tokens] that is True for real tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

WIDTH, HEADS, HEAD_DIM, HIDDEN, LAYERS, VOCABULARY, POSITIONS = 32, 4, 8, 80, 2, 61, 64


def heads_of(x: torch.Tensor) -> torch.Tensor:
    """[batch, tokens, width] as [batch, heads, tokens, head_dim]."""
    return x.view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Attention with two products, joined to [batch, tokens, width]; bias is added to the scores."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    joined = ((scores if bias is None else scores + bias).softmax(-1) @ v).transpose(1, 2)
    return joined.reshape(*joined.shape[:2], -1)


def additive(mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A mask [batch, tokens] as numbers to add to scores, [batch, 1, 1, tokens]."""
    return (1.0 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min


class Separate(nn.Module):
    """Layers for q, k, v and the output, by the usual names."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (heads_of(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v, additive(mask, x.dtype)))


class Rearranged(nn.Module):
    """Reshapes and permutations as einops makes them; the packed layer has qkv first or last."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        packed, (b, n, _) = self.to_qkv(x), x.shape
        if self.last:  # b n (h d qkv) -> qkv b h n d
            q, k, v = packed.reshape(b, n, HEADS, HEAD_DIM, 3).permute(4, 0, 2, 1, 3)
        else:  # b n (qkv h d) -> qkv b h n d
            q, k, v = packed.reshape(b, n, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * HEAD_DIM**-0.5
        dots = dots.masked_fill(~mask.reshape(b, 1, 1, n), -torch.finfo(dots.dtype).max)
        out = torch.einsum("b h i j, b h j d -> b h i d", dots.softmax(dim=-1), v)
        return self.to_out(out.permute(0, 2, 1, 3).reshape(b, n, HEADS * HEAD_DIM))


class ComplexRotary(nn.Module):
    """Rotary positions as complex numbers, from a buffer or computed in forward, as in the first Llama."""

    def __init__(self, computed: bool = False) -> None:
        super().__init__()
        self.wq, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.wk, self.wv = (nn.Linear(WIDTH, WIDTH // 2, bias=False) for _ in range(2))
        self.computed = computed
        if not computed:
            self.register_buffer("freqs_cis", self._table(POSITIONS, torch.device("cpu")), persistent=False)

    def _table(self, length: int, device: torch.device) -> torch.Tensor:
        freqs = 1.0 / 10000.0 ** (torch.arange(0, HEAD_DIM, 2, device=device).float() / HEAD_DIM)
        angles = torch.outer(torch.arange(length, device=device).float(), freqs)
        return torch.polar(torch.ones_like(angles), angles)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        freqs_cis = self._table(length, x.device) if self.computed else self.freqs_cis[:length]
        q, k, v = (layer(x).view(batch, length, -1, HEAD_DIM) for layer in (self.wq, self.wk, self.wv))
        q, k = (self._rotated(part, freqs_cis.view(1, length, 1, HEAD_DIM // 2)) for part in (q, k))
        k, v = (
            part[:, :, :, None, :].expand(batch, length, HEADS // 2, 2, HEAD_DIM).reshape(batch, length, HEADS, HEAD_DIM)
            for part in (k, v)
        )
        return self.wo(attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), additive(mask)))

    @staticmethod
    def _rotated(x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs_cis).flatten(3).type_as(x)


class Alibi(nn.Module):
    """Slopes times distances, as a parameterless table made in forward; symmetric, or causal as in MPT."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.Wqkv, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("slopes", torch.tensor([2.0 ** (-8 * (head + 1) / HEADS) for head in range(HEADS)]))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        positions = torch.arange(length, device=x.device)
        distance = positions[None, :] - positions[:, None]
        bias = self.slopes.view(HEADS, 1, 1) * (distance if self.causal else -distance.abs())
        q, k, v = (heads_of(part) for part in self.Wqkv(x).chunk(3, dim=2))
        bias = bias.masked_fill(~mask[:, None, None, :], float("-inf"))
        if self.causal:
            bias = bias.masked_fill(distance > 0, float("-inf"))
        return self.out_proj(functional.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))


class NormedHeads(nn.Module):
    """A norm for q and k of each head by itself: split, normalized, and concatenated again."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.q_norms, self.k_norms = (nn.ModuleList(nn.LayerNorm(HEAD_DIM) for _ in range(HEADS)) for _ in range(2))

    @staticmethod
    def _normed(x: torch.Tensor, norms: nn.ModuleList) -> torch.Tensor:
        parts = [norm(part) for norm, part in zip(norms, x.split(HEAD_DIM, dim=-1), strict=True)]
        return heads_of(torch.cat(parts, dim=-1))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k = self._normed(self.query(x), self.q_norms), self._normed(self.key(x), self.k_norms)
        return self.proj(attend(q, k, heads_of(self.value(x)), additive(mask)))


class Latent(nn.Module):
    """Multi-head latent attention: keys and values from a latent, and one rotary key shared by the heads."""

    RANK, ROTARY = 16, 4

    def __init__(self) -> None:
        super().__init__()
        self.q_a, self.q_b = nn.Linear(WIDTH, 24, bias=False), nn.Linear(24, HEADS * (HEAD_DIM + self.ROTARY), bias=False)
        self.kv_a = nn.Linear(WIDTH, self.RANK + self.ROTARY, bias=False)
        self.kv_norm = nn.RMSNorm(self.RANK)
        self.kv_b = nn.Linear(self.RANK, 2 * HEADS * HEAD_DIM, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        frequencies = 100.0 ** (-torch.arange(0, self.ROTARY, 2, device=x.device) / self.ROTARY)
        angles = torch.outer(torch.arange(x.shape[2], device=x.device).float(), frequencies).repeat(1, 2)
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q = self.q_b(self.q_a(x)).view(batch, length, HEADS, -1).transpose(1, 2)
        q_plain, q_rotary = q.split([HEAD_DIM, self.ROTARY], -1)
        latent, k_rotary = self.kv_a(x).split([self.RANK, self.ROTARY], -1)
        kv = self.kv_b(self.kv_norm(latent)).view(batch, length, HEADS, 2 * HEAD_DIM).transpose(1, 2)
        k_plain, v = kv.split(HEAD_DIM, -1)
        k_rotary = self._rotated(k_rotary.unsqueeze(1)).expand(-1, HEADS, -1, -1)
        q, k = torch.cat([q_plain, self._rotated(q_rotary)], -1), torch.cat([k_plain, k_rotary], -1)
        return self.o(attend(q, k, v, additive(mask)))


class MultiheadAttention(nn.Module):
    """PyTorch's nn.MultiheadAttention with padding; weights: adds the largest weight of each query to its output."""

    def __init__(self, weights: bool = False, rows: bool = False, batch_first: bool = True, **options: bool) -> None:
        super().__init__()
        self.weights, self.rows, self.batch_first = weights, rows, batch_first
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **options)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        arguments: dict[str, torch.Tensor] = {"key_padding_mask": ~mask}
        if self.rows:  # One mask a row and head; every token sees itself.
            seen = mask[:, None, :] | torch.eye(length, dtype=torch.bool, device=x.device)
            arguments = {"attn_mask": (~seen).repeat_interleave(HEADS, dim=0)}
        x = x if self.batch_first else x.transpose(0, 1)
        y, weights = self.attention(x, x, x, need_weights=self.weights, **arguments)
        y = y if self.batch_first else y.transpose(0, 1)
        return y if weights is None else y + weights.amax(-1, keepdim=True)


class LoraLinear(nn.Module):
    """A frozen layer with a low-rank update, added to the output, or to the weight when merged in forward."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.merged, self.scaling = merged, 2.0
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2), nn.Parameter(torch.randn(WIDTH))
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(4, WIDTH) * 0.2), nn.Parameter(torch.randn(WIDTH, 4) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.merged:
            return functional.linear(x, self.weight + (self.lora_B @ self.lora_A) * self.scaling, self.bias)
        return functional.linear(x, self.weight, self.bias) + (x @ self.lora_A.T @ self.lora_B.T) * self.scaling


class Lora(Separate):
    """LoRA on q and v."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.q_proj, self.v_proj = LoraLinear(merged), LoraLinear(merged)


class Int8Linear(nn.Module):
    """An int8 weight with a scale per output channel, dequantized in forward."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.randn(outputs, inputs) * 0.2
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("int_weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.int_weight.to(x.dtype) * self.scale, self.bias)


class FakeQuantLinear(nn.Linear):
    """A layer whose input and weight pass through fake quantizers with fixed scales."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, 0.05, 3, -128, 127)
        scale = self.weight.detach().abs().amax(1) / 127
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(self.weight, scale, zero_point, 0, -128, 127)
        return functional.linear(x, weight, self.bias)


class FeedForward(nn.Module):
    """An MLP with the given layers."""

    def __init__(self, linear: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.fc1, self.fc2 = linear(WIDTH, HIDDEN), linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Gated(nn.Module):
    """A gated MLP: separate layers, both from one layer with the gate last, or separated by stride."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "separate":
            self.w1, self.w3 = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        else:
            self.wi = nn.Linear(WIDTH, 2 * HIDDEN, bias=kind == "interleaved")
        self.w2 = nn.Linear(HIDDEN, WIDTH, bias=kind == "interleaved")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "separate":
            return self.w2(functional.silu(self.w1(x)) * self.w3(x))
        if self.kind == "gate-last":
            value, gate = self.wi(x).split(HIDDEN, dim=-1)
            return self.w2(value * functional.gelu(gate))
        packed = self.wi(x)
        return self.w2(packed[..., ::2].clamp(max=7.0).sigmoid() * (packed[..., 1::2] + 1.0))


class RMSNorm(nn.Module):
    """A root mean square norm, spelled in four ways."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling, self.weight = spelling, nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "rsqrt":
            return self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)
        if self.spelling == "norm":
            return x / (x.norm(2, dim=-1, keepdim=True) * WIDTH**-0.5 + 1e-8) * self.weight
        if self.spelling == "normalize":
            return functional.normalize(x, dim=-1) * WIDTH**0.5 * (self.weight + 1)
        return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) * self.weight


class Encoder(nn.Module):
    """Embeddings, layers, and an LM head, for token ids with a mask of padding."""

    def __init__(
        self,
        attention: Callable[[], nn.Module] = Separate,
        feed_forward: Callable[[], nn.Module] = FeedForward,
        norm: Callable[[], nn.Module] = lambda: nn.LayerNorm(WIDTH),
        *,
        parallel: bool = False,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.parallel = parallel
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": attention(), "mlp": feed_forward(), "norm1": norm(), "norm2": norm()}) for _ in range(LAYERS)
        )
        self.norm = norm()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def hidden(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The hidden states after the last norm, [batch, tokens, width]."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            if self.parallel:
                y = layer["norm1"](x)
                x = x + layer["attn"](y, attention_mask) + layer["mlp"](y)
                continue
            x = x + layer["attn"](layer["norm1"](x), attention_mask)
            x = x + layer["mlp"](layer["norm2"](x))
        return self.norm(x)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(ids, attention_mask))
