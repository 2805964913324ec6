"""Tests of lissom.compiler.transforms.channel_scaling: which channels can be scaled, and that scaling them changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.transforms.channel_scaling import ScalingSite, scaling_sites
from tests.support import captures
from tests.support.models import FeedForward, normal, seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

BUILDS = (tiny_bert, tiny_gpt2, tiny_llama, tiny_t5)


def program_of(module: nn.Module, inputs: object) -> Program:
    return captures.optimize(module, inputs).program.copy()


def sites_of(program: Program) -> tuple[Editor, dict[str, ScalingSite]]:
    edit = Editor(program, "test")
    return edit, {site.producer.name: site for site in scaling_sites(edit)}


class ReluFeedForward(nn.Module):
    """Norm, up, an activation, down."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor] = torch.relu) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.activation(self.up(self.norm(x))))


class Gated(nn.Module):
    """A gated feed-forward; with `packed`, its two sides come from one layer."""

    def __init__(self, *, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.gate, self.up, self.down = nn.Linear(8, 24 if packed else 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate(x).chunk(2, -1) if self.packed else (self.gate(x), self.up(x))
        return self.down(nn.functional.silu(gate) * up)


@pytest.mark.parametrize("build", BUILDS)
def test_scaling_every_site_changes_nothing(build: Callable[[], object]) -> None:
    case = build()
    program = program_of(case.model, case.inputs)
    before = program(*case.args, **case.kwargs)
    edit, sites = sites_of(program)
    assert sites
    for index, site in enumerate(sites.values()):
        site.scale(edit, normal(site.count, seed=index).exp())
    after = program(*case.args, **case.kwargs)
    # Factors of order e scale sums of some 20 terms in float32.
    torch.testing.assert_close(after[0], before[0], rtol=1e-4, atol=1e-5)


def test_norms_are_sites_where_linear_layers_alone_read_them() -> None:
    for build, norms in ((tiny_bert, 0), (tiny_gpt2, 4), (tiny_llama, 5), (tiny_t5, 4)):
        case = build()
        edit, sites = sites_of(program_of(case.model, case.inputs))
        assert sum("norm" in name for name in sites) == norms, build
        if build is tiny_bert:
            reason = "its output is also read by aten.add.Tensor, which no scale passes through"
            assert [item.reason for item in edit.skipped].count(reason) == 4


def test_values_of_grouped_heads_share_a_factor() -> None:
    """Four query heads of four channels read two value heads."""
    case = tiny_llama()
    _, sites = sites_of(program_of(case.model, case.inputs))
    values = [site for site in sites.values() if site.readers[0].layer.meta and "o_proj" in site.readers[0].matrix.name]
    assert [site.count for site in values] == [8, 8]
    wanted = [4 * (head // 2) + channel for head in range(4) for channel in range(4)]
    assert values[0].readers[0].channel.tolist() == wanted
    assert values[0].parameters[0].unit.tolist() == list(range(8))


def test_of_a_packed_projection_the_values_alone_are_scaled() -> None:
    case = tiny_gpt2()
    _, sites = sites_of(program_of(case.model, case.inputs))
    site = next(site for site in sites.values() if site.matrix is not None)
    assert site.matrix.transposed and [parameter.dim for parameter in site.parameters] == [1, 0]
    assert site.parameters[0].unit.tolist() == [-1] * 32 + list(range(16))


@pytest.mark.parametrize(
    ("activation", "treated"),
    [
        (torch.relu, True),
        (torch.nn.functional.leaky_relu, True),
        (torch.nn.functional.gelu, False),
        (lambda x: x * x, False),
        (lambda x: x + 1, False),
        (lambda x: x * torch.sigmoid(x), False),
    ],
)
def test_an_activation_has_to_carry_factors_through(activation: Callable[[torch.Tensor], torch.Tensor], treated: bool) -> None:
    _, sites = sites_of(program_of(seeded(lambda: ReluFeedForward(activation)), normal(2, 5, 8)))
    assert len([site for site in sites.values() if site.matrix is not None]) == treated


def test_of_gated_feed_forward_side_without_activation_is_scaled() -> None:
    _, sites = sites_of(program_of(seeded(lambda: Gated(packed=False)), normal(2, 5, 8)))
    (site,) = sites.values()
    assert site.parameters[0].weight.target == "up.weight" and site.count == 12


def test_both_sides_of_packed_gated_feed_forward_stay() -> None:
    """The product makes their channels one axis."""
    edit, sites = sites_of(program_of(seeded(lambda: Gated(packed=True)), normal(2, 5, 8)))
    assert not sites and "its output channels cannot be separated from other outputs" in [item.reason for item in edit.skipped]


class Selected(nn.Module):
    """The channels that one piece is made of make the other too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.up(x)
        return self.down(torch.relu(made[:, :2])).sum(1) + made[:, 2:].sum()


def test_channels_that_are_read_elsewhere_too_are_left_alone() -> None:
    edit, sites = sites_of(program_of(seeded(Selected), normal(2, 5, 8)))
    assert not sites and "its output channels cannot be separated from other outputs" in [item.reason for item in edit.skipped]


class Shared(nn.Module):
    """A norm whose reader is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.tanh(self.layer(self.norm(x)))) + x


def test_a_shared_weight_is_left_alone() -> None:
    edit, sites = sites_of(program_of(seeded(Shared), normal(2, 5, 8)))
    assert not sites
    assert "a layer that reads it cannot be scaled: its weight is read elsewhere too" in [item.reason for item in edit.skipped]


def test_a_norm_without_weights_is_left_alone() -> None:
    def build() -> nn.Module:
        module = FeedForward()
        module.norm = nn.LayerNorm(8, elementwise_affine=False)
        return module

    edit, sites = sites_of(program_of(seeded(build), normal(2, 5, 8)))
    assert not sites and "the norm has no weight of its own" in [item.reason for item in edit.skipped]


class PackedAttention(nn.Module):
    """Attention with shared key/value heads whose queries, keys and values come from one layer, as in Phi-3."""

    def __init__(self, heads: int, groups: int, *, bias: bool) -> None:
        super().__init__()
        self.sizes, self.heads, self.groups = [heads * 4, groups * 4, groups * 4], heads, groups
        self.norm, self.qkv = nn.RMSNorm(12), nn.Linear(12, sum(self.sizes), bias=bias)
        self.out = nn.Linear(heads * 4, 12, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.qkv(self.norm(x)).split(self.sizes, -1)
        counts = (self.heads, self.groups, self.groups)
        q, k, v = (part.unflatten(-1, (count, 4)).transpose(1, 2) for part, count in zip(packed, counts, strict=True))
        k, v = (part.repeat_interleave(self.heads // self.groups, 1) for part in (k, v))
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(found.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (6, 3), (4, 1)])
def test_values_of_packed_projection_with_shared_heads_are_scaled(heads: int, groups: int, bias: bool) -> None:
    program = program_of(seeded(lambda: PackedAttention(heads, groups, bias=bias)), normal(2, 5, 12))
    before = program(normal(2, 5, 12))
    edit, sites = sites_of(program)
    site = next(site for site in sites.values() if site.matrix is not None)
    assert site.count == groups * 4
    assert site.parameters[0].unit.tolist() == [-1] * (heads + groups) * 4 + list(range(groups * 4))
    wanted = [4 * (head * groups // heads) + channel for head in range(heads) for channel in range(4)]
    assert site.readers[0].channel.tolist() == wanted
    for index, found in enumerate(sites.values()):
        found.scale(edit, normal(found.count, seed=index).exp())
    # Factors of order e scale sums of some 20 terms in float32.
    torch.testing.assert_close(program(normal(2, 5, 12)), before, rtol=1e-4, atol=1e-5)


class Joined(nn.Module):
    """A norm of two tensors laid end to end."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 5), nn.Linear(8, 7)
        self.norm, self.layer = nn.LayerNorm(12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.norm(torch.cat([self.left(x), self.right(x)], -1)))


def test_channels_without_one_numbering_are_left_alone() -> None:
    edit, sites = sites_of(program_of(seeded(Joined), normal(2, 5, 8)))
    assert not sites
    assert "its output channels cannot be matched to the columns that read them" in [item.reason for item in edit.skipped]


@pytest.mark.parametrize("passes", ["awq", "smooth-quant", "equalize"])
def test_passes_scale_packed_projections_with_shared_heads(passes: str) -> None:
    """Each verifies against the program before, and changes the rows of the values alone."""
    module, x = seeded(lambda: PackedAttention(4, 2, bias=True)), normal(2, 5, 12)
    with torch.no_grad():
        module.qkv.weight[-8:] *= torch.linspace(0.1, 10, 8)[:, None]
    program = captures.optimize(module, x, passes=passes, data=[x]).program
    values = program.weight("qkv.weight")[-8:] / module.qkv.weight[-8:]
    assert not torch.allclose(values, torch.ones(()))
    torch.testing.assert_close(program(x), module(x), rtol=1e-4, atol=1e-5)
