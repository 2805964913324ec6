"""Any pipeline of up to three canonical passes keeps the numbers of any small transformer; programs print the same twice."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lissom.compiler.pipeline.spelling import format_pipeline
from lissom.passes import PASSES
from tests.models import normal, seeded
from tests.passes.harness import apply, capture_model

CANONICAL = [found() for found in PASSES.values() if ".canonical." in found.__module__]


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        return (1.0 + self.weight) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class Layer(nn.Module):
    """One transformer layer with everything written out; norms before the parts, or after the sums."""

    def __init__(self, heads: int, size: int, pre_norm: bool, activation: str) -> None:
        super().__init__()
        width = heads * size
        self.heads, self.pre_norm, self.activation = heads, pre_norm, {"gelu": gelu, "silu": silu}[activation]
        self.norms = nn.ModuleList([Norm(width), Norm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def attend(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        bias = (1.0 - mask[:, None, None, :].to(scores.dtype)) * torch.finfo(scores.dtype).min
        weights = self.dropout((scores + bias).softmax(-1))
        return self.out((weights @ v).transpose(1, 2).contiguous().view(batch, length, width))

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.down(self.activation(self.up(x))))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.pre_norm:
            x = x + self.attend(self.norms[0](x), mask)
            return x + self.feed(self.norms[1](x))
        x = self.norms[0](x + self.attend(x, mask))
        return self.norms[1](x + self.feed(x))


class Transformer(nn.Module):
    def __init__(self, layers: int, heads: int, size: int, pre_norm: bool, activation: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(heads, size, pre_norm, activation) for _ in range(layers)])

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


transformers = st.builds(
    lambda *options: seeded(lambda: Transformer(*options)),
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.sampled_from(["gelu", "silu"]),
)  # fmt: skip


def inputs(model: nn.Module, batch: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -1] = 0
    return normal(batch, length, model.layers[0].out.in_features, seed=seed), mask


@settings(max_examples=10, deadline=None, derandomize=True)
@given(model=transformers, chosen=st.lists(st.sampled_from(CANONICAL), min_size=1, max_size=3))
def test_any_pipeline_keeps_the_numbers(model: nn.Module, chosen: list) -> None:
    found = capture_model(model, *inputs(model, 2, 5))
    program, _ = apply(format_pipeline(chosen), found.program, found.example)
    sample = inputs(model, 3, 7, seed=1)
    with torch.no_grad():
        wanted = model(*sample)
        # Two layers of sums of up to 30 float32 terms, normalised to order 1 and scaled by weights below 5.
        torch.testing.assert_close(program(*sample), wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(model=transformers)
def test_a_program_prints_the_same_again(model: nn.Module) -> None:
    first = capture_model(model, *inputs(model, 2, 5)).program
    again = capture_model(model, *inputs(model, 2, 5)).program
    assert first.text() == first.copy().text() == again.text()
