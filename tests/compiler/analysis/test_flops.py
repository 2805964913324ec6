"""Tests of lissom.compiler.analysis.flops, with PyTorch's own counter as the oracle."""

import pytest
import torch
import transformers
from torch import nn

from lissom.compiler.analysis.cost import cost, flops, node_flops
from lissom.compiler.analysis.flops import is_counted
from lissom.frontends.capture.export import capture
from lissom.ops import block_sparse_attention
from lissom.ops.pattern import LAYOUT, Condition, Pattern
from tests.support.flop_counter import miscounted
from tests.support.models import CASES, Case, capture_of, normal, seeded
from tests.support.written_attention import tiny_whisper

aten = torch.ops.aten


class Applied(nn.Module):
    """A function of two tensors as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x, y):
        return self.function(x, y)


class Convolutions(nn.Module):
    """Every kind of convolution, grouped ones and transposed ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.padded = nn.Conv1d(4, 6, 3, padding="same")
        self.grouped = nn.Conv1d(6, 4, 5, stride=2, groups=2)
        self.back = nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2)
        self.image = nn.Conv2d(1, 4, (2, 3), padding="valid")
        self.image_back = nn.ConvTranspose2d(4, 2, 3, output_padding=1, stride=2)
        self.volume = nn.Conv3d(1, 2, (1, 2, 3))
        self.volume_back = nn.ConvTranspose3d(2, 1, 2)

    def forward(self, x):
        flat = self.back(self.grouped(self.padded(x)))
        image = self.image_back(self.image(flat.unsqueeze(1)))
        return self.volume_back(self.volume(image.unsqueeze(1)))


def tiny_vit() -> Case:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return Case(seeded(lambda: transformers.ViTModel(config)), {"pixel_values": normal(2, 3, 8, 8)})


def tiny_mixture() -> Case:
    config = transformers.MixtralConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return Case(seeded(lambda: transformers.MixtralModel(config)), {"inputs_embeds": normal(2, 5, 16)})


@pytest.mark.parametrize("name", CASES)
def test_every_node_is_counted_as_pytorch_counts_it(name):
    found = capture_of(name)
    assert miscounted(found.program, found.example) == []


@pytest.mark.parametrize("build", [tiny_vit, tiny_whisper, lambda: Case(seeded(Convolutions), (normal(2, 4, 20),))])
def test_images_sound_and_convolutions_are_counted_as_by_pytorch(build):
    case = build()
    found = capture(case.model, case.args, case.kwargs, dynamic=False)
    assert miscounted(found.program, found.example) == []
    assert flops(found.program) > 0


@pytest.mark.parametrize(
    ("function", "left", "right"),
    [
        (torch.matmul, (3, 4), (4, 5)),
        (torch.matmul, (2, 3, 4), (4, 5)),
        (torch.matmul, (6, 1, 3, 4), (2, 4, 5)),
        (torch.matmul, (4,), (2, 4, 5)),
        (torch.matmul, (3, 4), (4,)),
        (torch.matmul, (4,), (4,)),
        (nn.functional.linear, (4,), (5, 4)),
        (nn.functional.linear, (2, 3, 4), (5, 4)),
        (torch.bmm, (2, 3, 4), (2, 4, 5)),
        (torch.mm, (3, 4), (4, 5)),
        (lambda x, y: torch.addmm(torch.ones(5), x, y), (3, 4), (4, 5)),
        (lambda x, y: torch.baddbmm(torch.ones(1, 1, 5), x, y), (2, 3, 4), (2, 4, 5)),
        (torch.mul, (3, 4), (3, 4)),
    ],
)
def test_a_product_is_counted_as_pytorch_counts_it(function, left, right):
    found = capture(Applied(function), (normal(*left), normal(*right)), dynamic=False)
    assert miscounted(found.program, found.example) == []


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("ij,jk->ik", (3, 4), (4, 5)),
        ("ij,jk", (3, 4), (4, 5)),
        ("i,j->ij", (3,), (4,)),
        ("ij,ij->", (3, 4), (3, 4)),
        ("bij,bij->b", (2, 3, 4), (2, 3, 4)),
        ("bij,j->bi", (2, 3, 4), (4,)),
        ("ijk,jl->l", (3, 4, 5), (4, 6)),
        ("bij,bjk->bik", (1, 3, 4), (2, 4, 5)),
        ("ij,jk->ik", (3, 1), (1, 5)),
        ("bij,ij->b", (2, 3, 1), (3, 1)),
        ("...ij,...jk->...ik", (2, 3, 4), (4, 5)),
        ("b...i, ij -> b...j", (2, 3, 7, 4), (4, 5)),
        ("...ij,...jk", (6, 2, 3, 4), (2, 4, 5)),
        ("bclhn,bcshn->bclsh", (2, 3, 4, 2, 5), (2, 3, 4, 2, 5)),
    ],
)
def test_einsum_is_counted_as_pytorch_counts_it(equation, left, right):
    found = capture(Applied(lambda x, y: torch.einsum(equation, x, y)), (normal(*left), normal(*right)), dynamic=False)
    assert miscounted(found.program, found.example) == []


@pytest.mark.parametrize("equation", ["ij,jk,kl->il", "ik,kj,ij->", "ij,jk,kl->ijl"])
def test_einsum_of_three_takes_them_in_pytorchs_order(equation):
    three = Applied(lambda x, y: torch.einsum(equation, x, y, x))
    found = capture(three, (normal(4, 4), normal(4, 4, seed=1)), dynamic=False)
    (node,) = found.program.nodes(aten.einsum.default)
    assert miscounted(found.program, found.example) == []
    assert node_flops(node) > 0


@pytest.mark.parametrize(
    ("heads", "queries", "keys", "features", "gqa"),
    [((4, 4), 3, 5, 6, False), ((4, 2), 3, 5, 6, True), ((4, 1), 5, 5, 2, True)],
)
def test_attention_counts_shared_key_value_heads_per_query_head(heads, queries, keys, features, gqa):
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

    inputs = (normal(2, heads[0], queries, 6), normal(2, heads[1], keys, 6), normal(2, heads[1], keys, features))
    found = capture(Attention(), inputs, dynamic=False)
    (node,) = found.program.nodes(aten.scaled_dot_product_attention.default)
    assert miscounted(found.program, found.example) == []
    assert node_flops(node) == 2 * 2 * heads[0] * queries * keys * (6 + features)


def test_attention_broadcasts_a_batch_of_one():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(query=q, key=k, value=v)

    found = capture(Attention(), (normal(1, 2, 3, 4), normal(5, 2, 3, 4), normal(5, 2, 3, 4)), dynamic=False)
    (node,) = found.program.nodes(aten.scaled_dot_product_attention.default)
    assert node_flops(node) == 2 * 5 * 2 * 3 * 3 * (4 + 4)


def test_products_of_experts_count_which_pytorch_leaves_out():
    """Each of 2 · 5 tokens goes to two of four experts: up and gate [16, 48], down [24, 16]."""
    case = tiny_mixture()
    program = capture(case.model, case.args, case.kwargs).program
    grouped = [node for node in program.nodes() if node.target is torch.ops.lissom.grouped_product.default]
    assert [node_flops(node) for node in grouped] == [2 * 20 * 16 * 48, 2 * 20 * 24 * 16]
    assert all(map(is_counted, grouped))


@pytest.mark.parametrize(
    ("product", "weight"),
    [
        (lambda x, w: aten._int_mm.default(x.to(torch.int8), w.T), torch.ones(32, 48, dtype=torch.int8)),
        (
            lambda x, w: aten._scaled_mm.default(x.to(w.dtype), w.T, torch.ones(()), torch.ones(()), out_dtype=torch.float32),
            torch.ones(32, 48).to(torch.float8_e4m3fn),
        ),
        (lambda x, w: aten._weight_int8pack_mm.default(x, w, torch.ones(32)), torch.ones(32, 48, dtype=torch.int8)),
    ],
    ids=["int8", "fp8", "weights"],
)
def test_low_precision_products_count_as_float_products(product, weight):
    found = capture(Applied(product), (normal(5, 48), weight), dynamic=False)
    assert flops(found.program) == 2 * 5 * 48 * 32


BAND = Pattern(((Condition(-1, 1, -15, 0),),), 16)  # of 64 tokens: four blocks on the diagonal, three beside it


class BlockSparse(nn.Module):
    """Attention under a pattern, with a layout or without."""

    def __init__(self, pattern, layout=None):
        super().__init__()
        self.pattern = pattern
        self.register_buffer("layout", layout)

    def forward(self, x):
        q, k, v = (item.transpose(1, 2) for item in (x, x[:, :, :2], x[:, :, 2:]))
        options = {"pattern": self.pattern.encode(), "block": self.pattern.block, "scale": 0.25}
        return torch.ops.lissom.block_sparse_attention(q, k, v, None, self.layout, **options)


def block_sparse(pattern, tokens, layout=None, *, dynamic=False):
    return capture(BlockSparse(pattern, layout), (normal(2, tokens, 4, 6),), dynamic=dynamic).program


@pytest.mark.parametrize(("tokens", "pairs"), [(64, 7 * 256), (70, 9 * 256 - 256 + 6 * 6 + 6 * 16 - 256)])
def test_block_sparse_attention_counts_the_blocks_reached(tokens, pairs):
    (node,) = block_sparse(BAND, tokens).nodes(block_sparse_attention)
    assert node_flops(node) == 2 * 2 * 4 * pairs * (6 + 6)


def test_block_sparse_attention_counts_the_layout_of_each_head():
    layout = torch.zeros(4, 4, 4, dtype=torch.bool)
    layout[0, 1, :2] = layout[3, 2, 2] = layout[2, 3, 3] = True
    (node,) = block_sparse(Pattern(((LAYOUT,),), 16), 64, layout).nodes(block_sparse_attention)
    assert node_flops(node) == 2 * 2 * 4 * 256 * (6 + 6)


def test_block_sparse_attention_counts_once_length_is_known():
    program = block_sparse(BAND, 64, dynamic={"x": {0: "batch", 1: "sequence"}})
    (node,) = program.nodes(block_sparse_attention)
    assert "pairs(" in program.signature.name_of(cost(program)[node].flops)
    assert cost(program, {"batch": 3, "sequence": 128})[node].flops == 2 * 3 * 4 * 15 * 256 * (6 + 6)
