"""Whole models of users: decoders, image and speech models, experts, caches, and PyTorch's own transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from tools.zoo.users_attention import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    Encoder,
    FeedForward,
    attend,
    heads_of,
)


class NanoGPT(nn.Module):
    """nanoGPT: tied embeddings, a causal buffer or PyTorch's operator, and logits of the last token only in inference."""

    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.flash = flash
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.c_attn, self.c_proj, self.mlp, self.ln_1, self.ln_2 = (
            nn.ModuleList(build() for _ in range(LAYERS))
            for build in (
                lambda: nn.Linear(WIDTH, 3 * WIDTH), lambda: nn.Linear(WIDTH, WIDTH), FeedForward,
                lambda: nn.LayerNorm(WIDTH), lambda: nn.LayerNorm(WIDTH),
            )
        )  # fmt: skip
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight
        self.register_buffer("bias", torch.tril(torch.ones(POSITIONS, POSITIONS)).view(1, 1, POSITIONS, POSITIONS))

    def _attention(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        batch, length, width = x.size()
        q, k, v = (
            part.view(batch, length, HEADS, width // HEADS).transpose(1, 2)
            for part in self.c_attn[layer](x).split(width, dim=2)
        )
        if self.flash:
            y = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
            y = functional.softmax(att, dim=-1) @ v
        return self.c_proj[layer](y.transpose(1, 2).contiguous().view(batch, length, width))

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        _, t = idx.size()
        assert t <= POSITIONS, f"cannot forward a sequence of length {t}"
        x = self.wte(idx) + self.wpe(torch.arange(0, t, dtype=torch.long, device=idx.device))
        for layer in range(LAYERS):
            x = x + self._attention(self.ln_1[layer](x), layer)
            x = x + self.mlp[layer](self.ln_2[layer](x))
        if targets is None:
            return self.lm_head(self.ln_f(x)[:, [-1], :]), None
        logits = self.lm_head(self.ln_f(x))
        return logits, functional.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1), ignore_index=-1)


class SwinBlock(nn.Module):
    """Attention in windows of 4 x 4, rolled by `shift`, with a learned bias per relative position."""

    def __init__(self, size: int, shift: int, window: int = 4) -> None:
        super().__init__()
        self.shift, self.window = shift, window
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), FeedForward()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, HEADS))
        points = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        relative = (points[:, :, None] - points[:, None, :] + window - 1).permute(1, 2, 0)
        self.register_buffer("relative_position_index", relative[..., 0] * (2 * window - 1) + relative[..., 1])
        image = torch.zeros(1, size, size, 1)
        cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None)) if shift else (slice(None),)
        for number, (rows, columns) in enumerate((rows, columns) for rows in cuts for columns in cuts):
            image[:, rows, columns] = number
        areas = self._windows(image).squeeze(-1)
        mask = (areas[:, None, :] != areas[:, :, None]).float() * -100.0
        self.register_buffer("attn_mask", mask if shift else None)

    def _windows(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, channels = x.shape
        x = x.view(batch, height // self.window, self.window, width // self.window, self.window, channels)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window**2, channels)

    def _attention(self, windows: torch.Tensor) -> torch.Tensor:
        count, length, _ = windows.shape
        q, k, v = self.qkv(windows).reshape(count, length, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        scores = (q * HEAD_DIM**-0.5) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(length, length, -1)
        scores = scores + bias.permute(2, 0, 1).unsqueeze(0)
        if self.attn_mask is not None:
            kinds = self.attn_mask.shape[0]
            scores = scores.view(count // kinds, kinds, HEADS, length, length) + self.attn_mask[:, None]
            scores = scores.view(-1, HEADS, length, length)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(count, length, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, channels = x.shape
        y = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2)) if self.shift else self.norm1(x)
        y = self._attention(self._windows(y))
        y = y.view(batch, height // self.window, width // self.window, self.window, self.window, channels)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)
        x = x + (torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y)
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """Patches, two Swin blocks of which the second is shifted, and a classifier."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.blocks = nn.Sequential(SwinBlock(size, 0), SwinBlock(size, 2))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.patches(pixels).permute(0, 2, 3, 1)).mean((1, 2)))


class Conformer(nn.Module):
    """Half a feed-forward, attention, a gated depthwise convolution with a batch norm, and half a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.subsample = nn.Conv1d(16, WIDTH, 3, stride=2, padding=1)
        self.first, self.second = (
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, WIDTH)) for _ in range(2)
        )
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.conv_norm, self.pointwise1 = nn.LayerNorm(WIDTH), nn.Conv1d(WIDTH, 2 * WIDTH, 1)
        self.depthwise, self.batch_norm = nn.Conv1d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH), nn.BatchNorm1d(WIDTH)
        self.pointwise2, self.final = nn.Conv1d(WIDTH, WIDTH, 1), nn.LayerNorm(WIDTH)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = self.subsample(frames.transpose(1, 2)).transpose(1, 2)
        x = x + 0.5 * self.first(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = functional.glu(self.pointwise1(self.conv_norm(x).transpose(1, 2)), dim=1)
        x = x + self.pointwise2(functional.silu(self.batch_norm(self.depthwise(y)))).transpose(1, 2)
        return self.final(x + 0.5 * self.second(x))


class Perceiver(nn.Module):
    """Learned queries expanded to the batch, and heads folded into it, as in lucidrains' Perceiver."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, WIDTH))
        self.norm, self.norm_context = nn.LayerNorm(WIDTH), nn.LayerNorm(20)
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(20, 2 * WIDTH, bias=False)
        self.to_out, self.mlp, self.head = nn.Linear(WIDTH, WIDTH), FeedForward(), nn.Linear(WIDTH, 5)

    def forward(self, data: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch = data.shape[0]
        x = self.latents.unsqueeze(0).expand(batch, -1, -1)
        context = self.norm_context(data)
        q, (k, v) = self.to_q(self.norm(x)), self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (heads_of(part).reshape(batch * HEADS, -1, HEAD_DIM) for part in (q, k, v))
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * HEAD_DIM**-0.5
        folded = mask.repeat_interleave(HEADS, 0)[:, None, :]
        sim = sim.masked_fill(~folded, -torch.finfo(sim.dtype).max)
        out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
        out = out.reshape(batch, HEADS, -1, HEAD_DIM).transpose(1, 2).reshape(batch, -1, WIDTH)
        x = x + self.to_out(out)
        return self.head((x + self.mlp(x)).mean(1))


class Experts(nn.Module):
    """Experts chosen per token: a loop over modules, one with indices of its tokens, or stacked parameters."""

    def __init__(self, kind: str, count: int = 4, top: int = 2) -> None:
        super().__init__()
        self.kind, self.count, self.top = kind, count, top
        self.gate = nn.Linear(WIDTH, count, bias=False)
        if kind == "stacked":
            self.w1, self.w2 = (nn.Parameter(torch.randn(count, *shape) * 0.2) for shape in ((WIDTH, HIDDEN), (HIDDEN, WIDTH)))
        else:
            self.experts = nn.ModuleList(FeedForward() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, WIDTH)
        weights, chosen = self.gate(tokens).softmax(-1).topk(self.top, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        per_expert = torch.zeros(len(tokens), self.count, dtype=x.dtype, device=x.device).scatter(1, chosen, weights)
        if self.kind == "stacked":
            hidden = functional.gelu(torch.einsum("tw,ewh->teh", tokens, self.w1))
            return torch.einsum("teh,ehw,te->tw", hidden, self.w2, per_expert).view_as(x)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            if self.kind == "indices":
                rows, places = torch.where(chosen == index)
                y.index_add_(0, rows, expert(tokens[rows]) * weights[rows, places, None])
            else:
                y = y + expert(tokens) * per_expert[:, index, None]
        return y.view_as(x)


class Cached(nn.Module):
    """A decoder step with a KV cache [(k, v), ...] as an argument, which it returns longer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "out": nn.Linear(WIDTH, WIDTH), "mlp": FeedForward()})
            for _ in range(LAYERS)
        )

    def forward(
        self, ids: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        x, present = self.tokens(ids), []
        for layer, (keys, values) in zip(self.layers, past, strict=True):
            q, k, v = (heads_of(part) for part in layer["qkv"](x).chunk(3, -1))
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            present.append((k, v))
            future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - q.shape[2])
            x = x + layer["out"](attend(q, k, v, torch.zeros(()).masked_fill(~future, float("-inf"))))
            x = x + layer["mlp"](x)
        return self.head(x), present


@dataclass
class Outputs:
    """Logits and hidden states."""

    logits: torch.Tensor
    hidden: torch.Tensor | None = None


pytree.register_dataclass(Outputs)


class DataclassOutputs(Encoder):
    """A dataclass as output."""

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> Outputs:
        hidden = self.hidden(ids, attention_mask)
        return Outputs(logits=self.head(hidden), hidden=hidden)


class Collecting(Encoder):
    """Forward hooks on two layers collect features, which are returned with the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, torch.Tensor] = {}
        for name in ("layers.0.mlp", "layers.1.attn"):
            self.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: self.features.__setitem__(name, output)
            )

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = super().forward(ids, attention_mask)
        return {"logits": logits, **self.features}


class Assigning(Encoder):
    """A buffer assigned in forward: a table grown to the length, as in many rotary layers; or an average."""

    def __init__(self, averages: bool) -> None:
        super().__init__()
        self.averages = averages
        self.register_buffer("state", torch.zeros(1) if averages else torch.zeros(0, WIDTH), persistent=averages)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(ids, attention_mask)
        if self.averages:
            self.state = hidden.mean().reshape(1)
            return self.head(hidden) + self.state
        if ids.shape[1] > self.state.shape[0]:
            positions = torch.arange(ids.shape[1], device=ids.device)[:, None]
            self.state = torch.sin(positions / 10.0 ** torch.linspace(0, 4, WIDTH))
        return self.head(hidden + self.state[: ids.shape[1]])
