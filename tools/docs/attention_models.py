"""Small models with attention, for the pages of passes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Dropouts(nn.Module):
    """Self-attention with the dropout, casts and copies model code is full of; none changes anything at inference."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        heads = self.dropout(self.project(x)).view(batch, tokens, 4, -1).transpose(1, 2)
        weights = torch.softmax(heads @ heads.transpose(-1, -2), dim=-1).to(x.dtype)
        mixed = self.dropout(weights) @ heads
        return mixed.transpose(1, 2).contiguous().reshape(batch, tokens, width) * 1.0


class MergedProjection(nn.Module):
    """Self-attention whose queries, keys and values come from one projection, as in GPT-2."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        pieces = self.project(x).split(width, dim=-1)
        q, k, v = (piece.view(batch, tokens, 8, -1).transpose(1, 2) for piece in pieces)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.output(mixed.transpose(1, 2).reshape(batch, tokens, width))


class CountedMask(nn.Module):
    """Self-attention with a mask made as a function of positions, as Hugging Face's encoders make theirs."""

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        rows, tokens = seen.shape
        batch, positions = torch.arange(rows), torch.arange(tokens)
        always = positions[None, None, :, None] >= 0
        mask = always & seen[batch[:, None, None, None], positions[None, None, None, :]]
        heads = x.view(rows, tokens, 4, -1).transpose(1, 2)
        return functional.scaled_dot_product_attention(heads, heads, heads, mask)


class Attention(nn.Module):
    """Attention written out in parts, with a padding mask that is added to the scores."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores + (1.0 - mask[:, None, None, :]) * torch.finfo(x.dtype).min
        return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)


class Rotary(nn.Module):
    """Queries turned by their positions, as in Llama."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.frequencies = nn.Buffer(10000.0 ** -torch.linspace(0, 1, width // heads // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        angles = torch.arange(x.shape[1])[:, None] * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        first, second = q.chunk(2, dim=-1)
        return q * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


class Projections(nn.Module):
    """Queries, keys and values of one input."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return functional.scaled_dot_product_attention(q, k, v)


class SelfAttention(nn.Module):
    """Attention with its output projection, the input added back."""

    def __init__(self, width: int = 256, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.output(mixed.transpose(1, 2).flatten(2))


class EqualHeads(nn.Module):
    """Attention of eight heads whose keys and values are equal in each four."""

    def __init__(self, width: int = 256, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.output = (nn.Linear(width, width) for _ in range(4))
        with torch.no_grad():
            for parameter in (*self.k.parameters(), *self.v.parameters()):
                rows = parameter.view(heads // 4, 4, width // heads, -1)
                rows[:] = rows[:, :1].clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.output(mixed.transpose(1, 2).flatten(2))


class EinsumScores(nn.Module):
    """The scores of attention as an einsum over [batch, tokens, heads, head_dim], as in XLNet."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q, self.k))
        return torch.einsum("bihd,bjhd->bhij", q, k)


class FirstToken(nn.Module):
    """A layer of attention and a feed-forward, of which the first token is read, as a classifier reads `[CLS]`."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return (x + self.down(functional.gelu(self.up(x))))[:, 0]


class Padded(nn.Module):
    """Attention that a mask keeps from padding, and a feed-forward; every token is returned."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :]).transpose(1, 2).flatten(2)
        return x + self.down(functional.gelu(self.up(x)))


class PaddedAttention(nn.Module):
    """Attention with its output projection; a mask keeps it from padding."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        return x + self.output(mixed.transpose(1, 2).flatten(2))


class HeadsInFloat(nn.Module):
    """Attention in bfloat16 that takes its heads apart in float32."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.project(x).float().chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2).bfloat16() for part in parts)
        return functional.scaled_dot_product_attention(q, k, v)


class CachedAttention(nn.Module):
    """New tokens attend to a hundred that are kept, and are kept with them."""

    def __init__(self, width: int = 256, places: int = 512) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.register_buffer("keys", torch.randn(1, 4, places, width // 4))
        self.register_buffer("values", torch.randn(1, 4, places, width // 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = (part.view(batch, tokens, 4, -1).transpose(1, 2) for part in self.project(x).chunk(3, dim=-1))
        places = torch.arange(tokens) + 100
        keys, values = self.keys.index_copy(2, places, k), self.values.index_copy(2, places, v)
        self.keys.copy_(keys)
        self.values.copy_(values)
        seen = torch.arange(keys.shape[2]) <= places[:, None]
        hidden = functional.scaled_dot_product_attention(q, keys, values, seen)
        return self.output(hidden.transpose(1, 2).reshape(batch, tokens, width))


class LocalAttention(nn.Module):
    """Self-attention to the last 64 tokens, as in Mistral."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
        heads = self.project(x).view(batch, tokens, 4, -1).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(heads, heads, heads, (j <= i) & (i - j < 64))
        return mixed.transpose(1, 2).reshape(batch, tokens, width)
