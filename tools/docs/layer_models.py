"""Small models of other layers, for the pages of passes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from lissom.frontends.checkpoints.stored_weights import StoredWeight, keep_stored
from lissom.ops.gguf_blocks import BLOCK_TYPES
from lissom.ops.grouped_product import grouped_product


class TiedHead(nn.Module):
    """A language model without layers: words are looked up and scored with one matrix."""

    def __init__(self, words: int = 512, width: int = 256) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(functional.gelu(self.mix(self.words(ids))))


class UnusedPooler(nn.Module):
    """Computes a pooled vector and throws it away."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.pooler = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = functional.gelu(self.up(x))
        torch.tanh(self.pooler(hidden))
        return hidden


class GatedWeight(nn.Module):
    """Gates its weight anew at every call, although no input takes part in it."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)
        self.gate = nn.Parameter(torch.randn(width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight * torch.sigmoid(self.gate))


class ParallelBlock(nn.Module):
    """Two branches that each normalise the same input."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.left = nn.Linear(width, width)
        self.right = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.left(self.norm(x)) + functional.gelu(self.right(self.norm(x)))


class RmsNormed(nn.Module):
    """The normalisation of Llama and T5, written out in parts."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.project = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.project(self.weight * (x * torch.rsqrt(variance + 1e-6)))


class MergedGate(nn.Module):
    """A gated feed-forward whose gate and up projections are one layer, as in ModernBERT."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.project = nn.Linear(width, 8 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.project(x).chunk(2, dim=-1)
        return self.down(functional.gelu(gate) * value)


class FeedForward(nn.Module):
    """The tanh form of GELU, written out as in GPT-2."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        x = 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))
        return self.down(x)


class WrittenSoftmax(nn.Module):
    """A softmax in parts."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.project(x)
        powers = torch.exp(scores - scores.amax(-1, keepdim=True))
        return powers / powers.sum(-1, keepdim=True)


class Block(nn.Module):
    """A feed-forward block with the norm behind it, as in BERT."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(functional.gelu(self.up(x))) + x)


class DeadUnits(nn.Module):
    """A layer of which two heads of four, half of the neurons, and all of a second feed-forward contribute nothing."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.ups = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(2))
        with torch.no_grad():
            self.out.weight.view(width, heads, -1)[:, [1, 3]] = 0
            self.downs[0].weight[:, 2 * width :] = 0
        nn.init.zeros_(self.downs[1].weight)
        nn.init.zeros_(self.downs[1].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(functional.gelu(up(x)))
        return x


class Mixture(nn.Module):
    """A feed-forward of eight experts, of which a router chooses two for each token."""

    def __init__(self, width: int = 256, experts: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, width, width) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        ids, order = chosen.flatten().sort()
        ends = torch.histc(ids.float(), len(self.up), 0, len(self.up) - 1).cumsum(0, dtype=torch.int32)
        hidden = functional.gelu(grouped_product(x.flatten(0, 1)[order // 2], self.up, ends))
        outputs = grouped_product(hidden, self.down, ends) * weights.flatten()[order].unsqueeze(-1)
        return outputs[order.argsort()].unflatten(0, (-1, 2)).sum(1).view_as(x)


class Deep(nn.Module):
    """Two feed-forwards, one after the other."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(functional.gelu(up(norm(x))))
        return x


class Stream(nn.Module):
    """A stream of 256 channels between two layers."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.last = nn.Linear(width, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x + self.down(functional.gelu(self.up(self.norm(x)))))


class TwoInFour(nn.Module):
    """A feed-forward in bfloat16, of whose every four neighbouring weights two are zero."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, dtype=torch.bfloat16)
        self.down = nn.Linear(4 * width, width, dtype=torch.bfloat16)
        with torch.no_grad():
            for layer in (self.up, self.down):
                layer.weight.view(-1, 4)[:, ::2] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.gelu(self.up(x)))


class CastsByHand(nn.Module):
    """A feed-forward kept in float32 and computed in bfloat16, cast around every step, as automatic mixed precision does."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.up, self.down):
            weight, bias = layer.weight.bfloat16(), layer.bias.bfloat16()
            x = functional.silu(functional.linear(x.bfloat16(), weight, bias).float())
            x = x.bfloat16().float()
        return x


class UpProjection(nn.Module):
    """A linear layer and its activation."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.up(x))


class PreNorm(nn.Module):
    """A feed-forward block with the norm before it, as in GPT-2; some channels of its norm are large."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        with torch.no_grad():
            self.norm.weight[::64] = 30.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.relu(self.up(self.norm(x))))


class ConvolutionalStem(nn.Module):
    """Two convolutions over time in front of a transformer, as in Whisper."""

    def __init__(self, bands: int = 64, width: int = 256) -> None:
        super().__init__()
        self.first = nn.Conv1d(bands, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.second(functional.gelu(self.first(x))))


class Layered(nn.Module):
    """Four feed-forwards one after the other."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(width), "up": nn.Linear(width, 512), "down": nn.Linear(512, width)})
            for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            norm, up, down = layer["norm"], layer["up"], layer["down"]
            x = x + down(functional.gelu(up(norm(x))))
        return x


class FromFile(nn.Module):
    """A projection whose weight a GGUF file stores in Q8_0: blocks of 32 integers and a float16 scale, here random ones."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        blocks = torch.randint(0, 256, (4 * width * width // 32, 34), dtype=torch.uint8)
        blocks[:, :2] = torch.full((1,), 1e-3, dtype=torch.float16).view(torch.uint8)
        stored = StoredWeight(blocks, BLOCK_TYPES["Q8_0"], 4 * width, width)
        self.up = nn.Linear(width, 4 * width)
        self.up.weight = keep_stored(nn.Parameter(stored.unpack().dequantize(slice(None))), stored)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.gelu(self.up(x))
