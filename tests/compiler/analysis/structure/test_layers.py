"""Tests of layers, which the residual stream tells where module paths do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lissom.compiler.analysis.structure.layers import in_order
from lissom.compiler.analysis.structure.transformer import structure
from tests.support import captures
from tests.support.models import normal, seeded

WIDTH, HEADS = 8, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(attend(self.qkv(x)))


def attend(projected: torch.Tensor) -> torch.Tensor:
    rows, tokens, _ = projected.shape
    q, k, v = (item.view(rows, tokens, HEADS, -1).transpose(1, 2) for item in projected.chunk(3, -1))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, tokens, WIDTH)


def feed_forward() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))


class Block(nn.Module):
    def __init__(self, *, parallel: bool = False, post_norm: bool = False) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), feed_forward()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.parallel, self.post_norm = parallel, post_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.parallel:
            return x + self.attention(self.norm_1(x)) + self.mlp(self.norm_2(x))
        if self.post_norm:
            x = self.norm_1(x + self.attention(x))
            return self.norm_2(x + self.mlp(x))
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Named(nn.Module):
    """Layers named as in torchvision: `encoder_layer_0`."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for index in range(3):
            self.layers.add_module(f"encoder_layer_{index}", Block(**options))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class InForward(nn.Module):
    """Attention in the model's own forward, so that it has no module."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.mlp = nn.ModuleList(feed_forward() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for qkv, out, mlp in zip(self.qkv, self.out, self.mlp, strict=True):
            x = x + out(attend(qkv(functional.layer_norm(x, (WIDTH,)))))
            x = x + mlp(functional.layer_norm(x, (WIDTH,)))
        return x


def layers(model: nn.Module, passes: str | None = None) -> list[tuple[str, int, int]]:
    """The path of each layer, with the numbers of its attentions and feed-forwards."""
    options = {} if passes is None else {"passes": passes}
    program = captures.optimize(model, normal(2, 5, WIDTH), **options).program
    return [(layer.path, len(layer.attention), len(layer.feed_forward)) for layer in program.fact(structure).layers]


@pytest.mark.parametrize("options", [{}, {"parallel": True}, {"post_norm": True}], ids=["pre-norm", "parallel", "post-norm"])
def test_a_layer_needs_no_number_in_its_path(options) -> None:
    wanted = [(f"layers.encoder_layer_{index}", 1, 1) for index in range(3)]
    assert layers(seeded(lambda: Named(**options))) == wanted


def test_attention_in_own_forward_belongs_to_next_feed_forward() -> None:
    found = layers(seeded(InForward))
    assert [item[1:] for item in found] == [(1, 1)] * 3
    assert [path for path, *_ in found] == ["out.0", "out.1", "out.2"]


def test_numbered_paths_with_both_kinds_of_site_are_layers() -> None:
    model = seeded(lambda: nn.Sequential(*(Block() for _ in range(2))))
    assert layers(model) == [("0", 1, 1), ("1", 1, 1)]


@pytest.mark.parametrize("passes", ["low-rank{keep=0.9,whiten=false}", "quantize", "quantize{scheme=int4-weight,group=8}"])
def test_layers_behind_lossy_passes(passes: str) -> None:
    assert layers(seeded(Named), passes) == layers(seeded(Named))


def test_layers_sort_as_numbers() -> None:
    assert sorted(["h.10", "h.2", "h.1"], key=in_order) == ["h.1", "h.2", "h.10"]
