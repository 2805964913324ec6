"""Random small transformers, described by a record that can be saved, loaded and simplified."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from tools.fuzz.experts import DenseExperts, RoutedExperts

VOCABULARY, POSITIONS, TYPES = 31, 64, 2
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu-tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu-written-out": lambda x: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))),
}
_FILLS = {"infinity": float("-inf"), "smallest": torch.finfo(torch.float32).min, "ten-thousand": -1e4}


@dataclass(frozen=True)
class Spec:
    """A transformer. Every default is the simplest choice, so that shrinking a failure moves towards it.

    mask: the kind of mask. `keep` and `hide` are boolean [batch, tokens], `integers` is 1 for kept tokens, `additive` is 0
        for kept tokens and `fill` for the others; the `square` masks are [batch, 1, tokens, tokens].
    window: keys seen to the left of a query, itself included; 0 means all.
    experts: feed-forwards of which a router picks some per token; 0 means one feed-forward without a router.
    top_k: experts per token, for which tokens are sorted by expert; 0 means one, and every expert is computed.
    """

    layers: int = 1
    heads: int = 2
    key_value_heads: int = 2
    head_dim: int = 4
    neurons: int = 8
    projections: str = "separate"
    bias: bool = False
    norm: str = "layer"
    norm_written_out: bool = False
    pre_norm: bool = True
    activation: str = "relu"
    gate: str = "none"
    positions: str = "none"
    causal: bool = False
    window: int = 0
    mask: str = "none"
    fill: str = "infinity"
    attention: str = "operator"
    experts: int = 0
    top_k: int = 0
    shared_layers: bool = False
    query_key_norm: bool = False
    softcap: bool = False
    token_types: bool = False
    output: str = "hidden"
    keywords: bool = False
    weights: int = 0

    @property
    def width(self) -> int:
        """Features of the residual stream."""
        return self.heads * self.head_dim

    @property
    def sees_nothing(self) -> bool:
        """True if a query without visible keys gives NaN, as a decomposed softmax does; PyTorch's operator gives 0."""
        return self.fill == "infinity" and (self.attention == "written-out" or self.softcap)


CHOICES: dict[str, tuple[object, ...]] = {
    "layers": (1, 1, 2, 2, 3),
    "heads": (1, 2, 2, 3, 4, 4, 6, 8),
    "head_dim": (2, 4, 4, 6, 8, 8, 16),
    "neurons": (5, 8, 12, 16, 24, 33),
    "projections": ("separate", "separate", "packed", "packed-interleaved", "packed-key-value"),
    "bias": (False, True, True),
    "norm": ("layer", "rms", "none"),
    "norm_written_out": (False, True),
    "pre_norm": (True, True, False),
    "activation": tuple(_ACTIVATIONS),
    "gate": ("none", "none", "separate", "packed"),
    "positions": ("none", "learned", "rotary", "alibi", "relative"),
    "causal": (False, True),
    "window": (0, 0, 0, 1, 3, 8),
    "mask": ("none", "keep", "hide", "integers", "integers", "additive", "square-keep", "square-additive"),
    "fill": tuple(_FILLS),
    "attention": ("operator", "written-out"),
    "experts": (0, 0, 0, 3, 6),
    "top_k": (0, 1, 2, 2),
    "shared_layers": (False, False, False, True),
    "query_key_norm": (False, False, False, True),
    "softcap": (False, False, False, True),
    "token_types": (False, False, True),
    "output": ("hidden", "logits", "tied-logits", "pooled", "several"),
    "keywords": (False, True),
}


def draw_spec(generator: random.Random) -> Spec:
    """A random transformer."""
    chosen = {name: generator.choice(values) for name, values in CHOICES.items()}
    heads = int(str(chosen["heads"]))
    chosen["key_value_heads"] = generator.choice([count for count in range(1, heads + 1) if heads % count == 0])
    if chosen["positions"] == "rotary" and int(str(chosen["head_dim"])) % 2:
        chosen["head_dim"] = 4
    return Spec(**chosen, weights=generator.randrange(1 << 30))  # pyright: ignore[reportArgumentType]


def build(spec: Spec) -> nn.Module:
    """The transformer in evaluation mode with reproducible weights; the global generator is not advanced."""
    with torch.random.fork_rng():
        torch.manual_seed(spec.weights)
        model = Transformer(spec)
        for name, weight in model.named_parameters():
            # Weights keep activations near 1, and no bias is zero and no norm weight one, so that a dropped one shows.
            spread, middle = (weight.shape[-1] ** -0.5, 0.0) if weight.dim() > 1 else (0.3, float("norm" in name))
            nn.init.normal_(weight, middle, 1.0 if "embedding" in name else spread)
    return model.eval()


def draw_inputs(spec: Spec, batch: int, length: int, padding: str, seed: int) -> dict[str, torch.Tensor]:
    """Inputs of a transformer by the names of its arguments.

    padding: where tokens are masked out: `none`, `right`, `left`, `holes`, or `single`, which leaves one token in each row.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = {"tokens": torch.randint(0, VOCABULARY, (batch, length), generator=generator)}
    if spec.mask != "none":
        if spec.sees_nothing and padding != "none":
            padding = "none" if spec.window else "right"
        inputs["mask"] = _encode_mask(spec, _draw_kept(batch, length, padding, generator))
    if spec.token_types:
        inputs["types"] = torch.randint(0, TYPES, (batch, length), generator=generator)
    return inputs


def _draw_kept(batch: int, length: int, padding: str, generator: torch.Generator) -> torch.Tensor:
    """A random mask of the real tokens; at least one in each row."""
    kept = torch.ones(batch, length, dtype=torch.bool)
    counts = torch.randint(1, length + 1, (batch, 1), generator=generator)
    places = torch.arange(length)[None]
    if padding == "right":
        kept = places < counts
    elif padding == "left":
        kept = places >= length - counts
    elif padding == "holes":
        kept = torch.rand(batch, length, generator=generator) < 0.6
    elif padding == "single":
        kept = places == counts - 1
    kept[~kept.any(1), 0] = True
    return kept


def _encode_mask(spec: Spec, kept: torch.Tensor) -> torch.Tensor:
    """The mask in the form that the transformer takes. kept: [batch, tokens]."""
    length = kept.shape[1]
    if spec.mask == "keep":
        return kept
    if spec.mask == "hide":
        return ~kept
    if spec.mask == "integers":
        return kept.long()
    if spec.mask.startswith("square"):
        kept = (kept[:, None, None, :] | torch.eye(length, dtype=torch.bool)).expand(-1, 1, -1, -1).contiguous()
    return kept if spec.mask == "square-keep" else torch.zeros(kept.shape).masked_fill(~kept, _FILLS[spec.fill])


def kept_tokens(spec: Spec, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The real tokens of a mask [batch, tokens]; None if there is no mask or it has another form."""
    if mask is None or spec.mask.startswith("square"):
        return None
    return {"keep": lambda: mask, "hide": lambda: ~mask, "integers": mask.bool, "additive": lambda: mask == 0}[spec.mask]()


class Norm(nn.Module):
    """LayerNorm or RMSNorm, as PyTorch's function or decomposed."""

    def __init__(self, width: int, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        if spec.norm != "none":
            self.norm_weight = nn.Parameter(torch.ones(width))
        if spec.norm == "layer":
            self.norm_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spec.norm == "none":
            return x
        if self.spec.norm == "rms":
            if not self.spec.norm_written_out:
                return functional.rms_norm(x, x.shape[-1:], self.norm_weight, 1e-6)
            return self.norm_weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        if not self.spec.norm_written_out:
            return functional.layer_norm(x, x.shape[-1:], self.norm_weight, self.norm_bias)
        centred = x - x.mean(-1, keepdim=True)
        return self.norm_weight * centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() + self.norm_bias


class Attention(nn.Module):
    """Attention with its projections in one of four layouts."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        kept = spec.key_value_heads * spec.head_dim
        if spec.projections.startswith("packed") and spec.projections != "packed-key-value":
            self.qkv = nn.Linear(spec.width, spec.width + 2 * kept, spec.bias)
        else:
            self.q = nn.Linear(spec.width, spec.width, spec.bias)
            if spec.projections == "packed-key-value":
                self.kv = nn.Linear(spec.width, 2 * kept, spec.bias)
            else:
                self.k, self.v = nn.Linear(spec.width, kept, spec.bias), nn.Linear(spec.width, kept, spec.bias)
        self.out = nn.Linear(spec.width, spec.width, spec.bias)
        if spec.query_key_norm:
            self.q_norm, self.k_norm = Norm(spec.head_dim, spec), Norm(spec.head_dim, spec)
        if spec.positions == "relative":
            self.distance_embedding = nn.Embedding(9, spec.heads)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, [batch, heads, tokens, head_dim] each."""
        spec, (batch, length, _) = self.spec, x.shape
        kept, size = spec.key_value_heads, spec.head_dim
        if spec.projections == "packed-interleaved":
            grouped = self.qkv(x).view(batch, length, kept, spec.heads // kept + 2, size)
            q = grouped[..., :-2, :].reshape(batch, length, spec.heads, size)
            return q.transpose(1, 2), grouped[..., -2, :].transpose(1, 2), grouped[..., -1, :].transpose(1, 2)
        if spec.projections == "packed":
            q, k, v = self.qkv(x).split([spec.width, kept * size, kept * size], -1)
        elif spec.projections == "packed-key-value":
            q, (k, v) = self.q(x), self.kv(x).chunk(2, -1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (projection.view(batch, length, -1, size).transpose(1, 2) for projection in (q, k, v))
        return q, k, v

    def bias_of(self, length: int, x: torch.Tensor) -> torch.Tensor | None:
        """The position bias of the scores, [heads, tokens, tokens]."""
        distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        if self.spec.positions == "alibi":
            slopes = 2.0 ** -torch.arange(1.0, self.spec.heads + 1)
            return (-distance.abs() * slopes[:, None, None]).to(x.dtype)
        if self.spec.positions == "relative":
            return self.distance_embedding(distance.clamp(-4, 4) + 4).permute(2, 0, 1)
        return None

    def forward(self, x: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        spec, (batch, length, _) = self.spec, x.shape
        q, k, v = self.project(x)
        if spec.query_key_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if spec.positions == "rotary":
            q, k = _rotate(q), _rotate(k)
        repeats = spec.heads // spec.key_value_heads
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        bias = _join(self.bias_of(length, x), hidden)
        if spec.attention == "operator" and not spec.softcap:
            y = functional.scaled_dot_product_attention(q, k, v, bias)
        else:
            scores = q @ k.transpose(-2, -1) * spec.head_dim**-0.5
            scores = 5.0 * torch.tanh(scores / 5.0) if spec.softcap else scores
            y = (scores if bias is None else scores + bias).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, spec.width))


def _join(bias: torch.Tensor | None, hidden: torch.Tensor | None) -> torch.Tensor | None:
    return bias if hidden is None else hidden if bias is None else bias + hidden


def _rotate(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 100.0 ** -(torch.arange(half) / half)[None, :]
    cos, sin = (torch.cat([table, table], -1).to(x.dtype) for table in (angles.cos(), angles.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class FeedForward(nn.Module):
    """A feed-forward, plain or gated, with gate and up projection packed or separate."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.up = nn.Linear(spec.width, spec.neurons * (2 if spec.gate == "packed" else 1), spec.bias)
        if spec.gate == "separate":
            self.gate = nn.Linear(spec.width, spec.neurons, spec.bias)
        self.down = nn.Linear(spec.neurons, spec.width, spec.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activation = _ACTIVATIONS[self.spec.activation]
        if self.spec.gate == "none":
            return self.down(activation(self.up(x)))
        gate, up = self.up(x).chunk(2, -1) if self.spec.gate == "packed" else (self.gate(x), self.up(x))
        return self.down(activation(gate) * up)


def _feed_forward(spec: Spec) -> nn.Module:
    if not spec.experts:
        return FeedForward(spec)
    if not spec.top_k:
        return DenseExperts(spec.width, [FeedForward(spec) for _ in range(spec.experts)])
    activation, gate = _ACTIVATIONS[spec.activation], spec.gate != "none"
    return RoutedExperts(spec.width, spec.neurons, spec.experts, spec.top_k, activation, gate=gate, bias=spec.bias)


class Layer(nn.Module):
    """Attention and feed-forward, pre-norm or post-norm."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.attention, self.feed_forward = Attention(spec), _feed_forward(spec)
        self.first_norm, self.second_norm = Norm(spec.width, spec), Norm(spec.width, spec)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        if self.spec.pre_norm:
            x = x + self.attention(self.first_norm(x), hidden)
            return x + self.feed_forward(self.second_norm(x))
        x = self.first_norm(x + self.attention(x, hidden))
        return self.second_norm(x + self.feed_forward(x))


class Transformer(nn.Module):
    """The transformer that a `Spec` describes."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(VOCABULARY, spec.width)
        if spec.positions == "learned":
            self.position_embedding = nn.Embedding(POSITIONS, spec.width)
        if spec.token_types:
            self.type_embedding = nn.Embedding(TYPES, spec.width)
        layer = Layer(spec)
        self.layers = nn.ModuleList([layer if spec.shared_layers or not at else Layer(spec) for at in range(spec.layers)])
        self.last_norm = Norm(spec.width, spec)
        if spec.output in ("logits", "several"):
            self.head = nn.Linear(spec.width, VOCABULARY, False)

    def hidden(self, mask: torch.Tensor | None, length: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The additive mask of padding, causality and window, broadcast to [batch, 1, tokens, tokens]."""
        spec, shown = self.spec, None
        if spec.causal:
            shown = torch.ones(length, length, dtype=torch.bool).tril()
        if spec.window:
            distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
            near = (distance < spec.window) & (distance > -spec.window)
            shown = near if shown is None else shown & near
        fill = max(_FILLS[spec.fill], torch.finfo(dtype).min) if spec.fill != "infinity" else float("-inf")
        if mask is None:
            return None if shown is None else torch.zeros(length, length, dtype=dtype).masked_fill(~shown, fill)
        if spec.mask.endswith("additive"):
            bias = (mask if mask.dim() == 4 else mask[:, None, None, :]).to(dtype)
            return bias if shown is None else bias.masked_fill(~shown, fill)
        kept = {"hide": lambda: ~mask, "integers": lambda: mask == 1}.get(spec.mask, lambda: mask)()
        kept = kept if kept.dim() == 4 else kept[:, None, None, :]
        kept = kept if shown is None else kept & shown
        return torch.zeros(kept.shape, dtype=dtype).masked_fill(~kept, fill)

    def forward(
        self, tokens: torch.Tensor, mask: torch.Tensor | None = None, types: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        length = tokens.shape[1]
        x = self.embedding(tokens)
        if self.spec.positions == "learned":
            x = x + self.position_embedding(torch.arange(length))
        if types is not None:
            x = x + self.type_embedding(types)
        hidden = self.hidden(mask, length, x.dtype)
        for layer in self.layers:
            x = layer(x, hidden)
        x = self.last_norm(x)
        if self.spec.output == "logits":
            return self.head(x)
        if self.spec.output == "tied-logits":
            return functional.linear(x, self.embedding.weight)
        if self.spec.output == "pooled":
            return x[:, 0].tanh()
        return (x, self.head(x[:, -1])) if self.spec.output == "several" else x


def simpler(spec: Spec) -> list[Spec]:
    """Transformers that are simpler than this one in one choice."""
    candidates = []
    for field in dataclasses.fields(Spec):
        value = spec.heads if field.name == "key_value_heads" else field.default
        candidate = dataclasses.replace(spec, **{field.name: value})
        if candidate != spec and candidate.heads % candidate.key_value_heads == 0:
            candidates.append(candidate)
    return candidates
