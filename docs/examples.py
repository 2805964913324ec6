"""For each pass, a small model that shows it at work; `generate.py` makes the pages of docs/passes from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from lissom.frontends.stored_weights import StoredWeight, keep_stored
from lissom.ops.gguf_blocks import BLOCK_TYPES


@dataclass(frozen=True)
class Example:
    """A small model for one pass.

    inputs: Python text that makes its inputs. passes: the pipeline the pass is shown in. data: Python text that makes
    calibration data, for passes that need some. imports: lines that the model needs besides PyTorch's.
    """

    model: type[nn.Module]
    inputs: str
    passes: str = "exact"
    data: str = ""
    imports: str = ""


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


class WrittenSoftmax(nn.Module):
    """A softmax in parts."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.project(x)
        powers = torch.exp(scores - scores.amax(-1, keepdim=True))
        return powers / powers.sum(-1, keepdim=True)


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


class Block(nn.Module):
    """A feed-forward block with the norm behind it, as in BERT."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(functional.gelu(self.up(x))) + x)


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


_RAGGED = "(torch.randn(4, 128, 256), torch.arange(128) < torch.tensor([[128], [40], [30], [20]]))"


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


EXAMPLES = {
    "eliminate-dead-code": Example(UnusedPooler, "torch.randn(4, 128, 256)"),
    "remove-no-ops": Example(Dropouts, "torch.randn(4, 128, 256)"),
    "fold-constants": Example(GatedWeight, "torch.randn(4, 128, 256)"),
    "merge-common-subexpressions": Example(ParallelBlock, "torch.randn(4, 128, 256)"),
    "rewrite-einsum": Example(EinsumScores, "torch.randn(4, 128, 256)"),
    "raise-rms-norm": Example(RmsNormed, "torch.randn(4, 128, 256)"),
    "raise-activations": Example(FeedForward, "torch.randn(4, 128, 256)"),
    "raise-softmax": Example(WrittenSoftmax, "torch.randn(4, 128, 256)"),
    "raise-rotary": Example(Rotary, "torch.randn(4, 128, 256)"),
    "merge-projections": Example(Projections, "torch.randn(4, 128, 256)", "merge-projections{always=true}"),
    "eliminate-dead-tokens": Example(FirstToken, "torch.randn(4, 128, 256)", "eliminate-dead-tokens"),
    "zero-padding": Example(Padded, _RAGGED, "zero-padding"),
    "pack-tokens": Example(Padded, _RAGGED, "zero-padding,pack-tokens"),
    "cast": Example(Block, "torch.randn(4, 128, 256)", "cast{dtype=bf16}"),
    "fold-casts": Example(CastsByHand, "torch.randn(4, 128, 256)", "fold-casts"),
    "sink-casts": Example(HeadsInFloat, "torch.randn(4, 128, 256).bfloat16()", "sink-casts"),
    "quantize": Example(Block, "torch.randn(4, 128, 256)", "quantize"),
    "fold-quantized-weights": Example(Block, "torch.randn(4, 128, 256)", "quantize{scheme=int8-weight},fold-quantized-weights"),
    "untie-lm-head": Example(TiedHead, "torch.randint(0, 512, (4, 128))", "untie-lm-head"),
    "use-stored-weights": Example(
        FromFile,
        "torch.randn(4, 128, 256)",
        "use-stored-weights",
        imports="from lissom.frontends.stored_weights import StoredWeight, keep_stored\n"
        "from lissom.ops.gguf_blocks import BLOCK_TYPES",
    ),
    "prune-heads": Example(SelfAttention, "torch.randn(4, 128, 256)", "prune-heads{keep=0.5}"),
    "prune-neurons": Example(Block, "torch.randn(4, 128, 256)", "prune-neurons{keep=0.5}"),
    "sparsify-attention": Example(SelfAttention, "torch.randn(1, 512, 256)", "sparsify-attention{window=64,global_tokens=1}"),
    "lower-sparse-attention": Example(LocalAttention, "torch.randn(1, 512, 256)", "lower-sparse-attention{always=true}"),
    "fuse-attention": Example(Projections, "torch.randn(4, 128, 256)", "fuse-attention"),
    "fuse-norm": Example(RmsNormed, "torch.randn(4, 128, 256)", "fuse-norm"),
    "split-gates": Example(MergedGate, "torch.randn(4, 128, 256)", "split-gates"),
    "fuse-rotary": Example(Rotary, "torch.randn(4, 128, 256)", "fuse-rotary"),
    "pack-linear": Example(Block, "torch.randn(4, 128, 256)", "pack-linear"),
    "pack-quantized-linear": Example(
        Block, "torch.randn(4, 128, 256)", "quantize,fold-quantized-weights,pack-quantized-linear"
    ),
    "lower-quantized-products": Example(
        UpProjection,
        "torch.randn(4, 128, 256)",
        "quantize{lm_head=true},fold-quantized-weights,lower-quantized-products{always=true}",
    ),
    "fuse-epilogues": Example(Block, "torch.randn(4, 128, 256)", "pack-linear,fuse-epilogues"),
    "fuse-unpadded-attention": Example(
        PaddedAttention, _RAGGED, "zero-padding,pack-tokens,fuse-attention,fuse-unpadded-attention"
    ),
    "fuse-merged-attention": Example(
        MergedProjection, "torch.randn(1, 32, 256)", "fuse-attention,pack-linear,fuse-merged-attention"
    ),
    "simplify-masks": Example(CountedMask, "(torch.randn(4, 128, 256), torch.ones(4, 128, dtype=torch.bool))"),
    "raise-attention": Example(Attention, "(torch.randn(4, 128, 256), torch.ones(4, 128))"),
    "pool-heads": Example(SelfAttention, "torch.randn(4, 128, 256)", "pool-heads{groups=2},merge-equal-heads"),
    "merge-equal-heads": Example(EqualHeads, "torch.randn(4, 128, 256)", "merge-equal-heads"),
    "eliminate-dead": Example(DeadUnits, "torch.randn(4, 128, 256)", "eliminate-dead"),
    "prune-layers": Example(Deep, "torch.randn(4, 128, 256)", "prune-layers{keep=0.5,criterion=magnitude}"),
    "prune-hidden": Example(
        Stream,
        "torch.randn(4, 128, 64)",
        "prune-hidden{keep=0.5,criterion=magnitude,reconstruct=false}",
    ),
    "sparsify": Example(Block, "torch.randn(4, 128, 256)", "sparsify{keep=0.5}"),
    "pack-sparse": Example(TwoInFour, "torch.randn(4, 128, 256).bfloat16()", "pack-sparse{always=true}"),
    "gptq": Example(
        Block, "torch.randn(4, 128, 256)", "quantize{scheme=int4-weight},gptq", "[torch.randn(4, 128, 256) for _ in range(4)]"
    ),
    "smooth-quant": Example(
        PreNorm,
        "torch.randn(4, 128, 256)",
        "smooth-quant,quantize{scheme=int8-static}",
        "[torch.randn(4, 128, 256) for _ in range(4)]",
    ),
    "awq": Example(
        PreNorm, "torch.randn(4, 128, 256)", "awq,quantize{scheme=int4-weight}", "[torch.randn(4, 128, 256) for _ in range(4)]"
    ),
    "write-state-in-place": Example(CachedAttention, "torch.randn(1, 4, 256)", "write-state-in-place"),
    "quantize-cache": Example(CachedAttention, "torch.randn(1, 4, 256)", "quantize-cache"),
    "low-rank": Example(Block, "torch.randn(4, 128, 256)", "low-rank{rank=64}", "[torch.randn(4, 128, 256) for _ in range(4)]"),
    "linear-attention": Example(
        MergedProjection, "torch.randn(1, 1024, 256)", "linear-attention", data="[torch.randn(2, 256, 256)]"
    ),
    "depthwise-separable": Example(
        ConvolutionalStem,
        "torch.randn(4, 64, 200).cumsum(-1)",
        "depthwise-separable{budget=0.5}",
        "[torch.randn(4, 64, 200).cumsum(-1) for _ in range(4)]",
    ),
    "share-layers": Example(Layered, "torch.randn(4, 128, 256)", "share-layers{every=2}"),
    "shard": Example(PreNorm, "torch.randn(4, 128, 256)", "shard{world_size=2}"),
    "partition": Example(PreNorm, "torch.randn(4, 128, 256)", "shard{world_size=2},partition"),
    "equalize": Example(PreNorm, "torch.randn(4, 128, 256)", "equalize"),
    "distill": Example(
        Block,
        "torch.randn(4, 128, 256)",
        "prune-neurons{keep=0.5},distill{steps=60,learning_rate=0.001}",
        "[torch.randn(4, 128, 256) for _ in range(20)]",
    ),
    "finetune": Example(
        Block,
        "torch.randn(4, 128, 256)",
        "finetune{steps=60,learning_rate=0.001}",
        "[{'x': torch.ones(4, 128, 256) * i, 'labels': torch.ones(4, 128, 256)} for i in range(8)]",
    ),
    "correct-bias": Example(
        Block,
        "torch.randn(4, 128, 256)",
        "quantize{scheme=int4-weight},correct-bias",
        "[torch.randn(4, 128, 256) for _ in range(4)]",
    ),
}
