"""Tests of lissom.backends.onnx.variants, rotary, norms and projections: every form of a model gives the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

from lissom.backends.names import input_names
from lissom.backends.onnx.export import export_onnx, save_onnx
from lissom.backends.onnx.variants import ATTENTION, CHOICES, PROJECTIONS, RMS_NORMS, ROTARY, write_variant
from lissom.frontends.capture.export import capture
from lissom.ops import rotary
from tests.support.models import normal, seeded


class Block(nn.Module):
    """Norm, grouped-query attention with rotary embedding, and a gated feed-forward: a layer of a Llama."""

    def __init__(self, bias: bool = False, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.norm, self.second = nn.RMSNorm(16, eps=1e-6), nn.RMSNorm(16, eps=1e-6)
        self.q, self.k, self.v = (nn.Linear(16, 4 * count, bias=bias) for count in (heads, groups, groups))
        self.out = nn.Linear(4 * heads, 16, bias=bias)
        self.gate, self.up, self.down = nn.Linear(16, 24, bias=bias), nn.Linear(16, 24, bias=bias), nn.Linear(24, 16, bias=bias)

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (item(h).unflatten(-1, (-1, 4)).transpose(1, 2) for item in (self.q, self.k, self.v))
        table = torch.cat((angles, angles), -1)[:, None]
        q, k = (rotary(item, table.cos(), table.sin()) for item in (q, k))
        k, v = (
            item[:, :, None].expand(-1, -1, self.heads // self.groups, -1, -1).reshape(q.shape[0], self.heads, -1, 4)
            for item in (k, v)
        )
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        h = self.second(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


def exported(model: nn.Module, inputs: tuple[torch.Tensor, ...]):
    found = capture(model, inputs)
    return found, export_onnx(found.program, found.example, decompose=False)


def run(found, model, folder, inputs):
    path = save_onnx(model, folder)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, dict(zip(input_names(found.program), (x.numpy() for x in inputs), strict=True)))
    return result, Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture(scope="module", params=[False, True], ids=["without biases", "with biases"])
def block(request):
    model = seeded(lambda: Block(request.param))
    return model, *exported(model, (normal(2, 5, 16), normal(1, 5, 2, seed=1)))


@pytest.mark.parametrize(
    "chosen", [(), *((name,) for name in CHOICES), tuple(CHOICES)], ids=lambda item: "+".join(item) or "plain"
)
def test_every_form_gives_what_the_model_gives(block, chosen, tmp_path):
    model, found, export = block
    written, places = write_variant(export, chosen)
    for shape in ((2, 5), (1, 1), (3, 7)):
        inputs = normal(*shape, 16, seed=3), normal(1, shape[1], 2, seed=4)
        result, _ = run(found, written, tmp_path, inputs)
        # Sums of at most 24 terms of float32 in one layer, unit roundoff 6e-8.
        np.testing.assert_allclose(result, model(*inputs).detach(), rtol=1e-5, atol=2e-6)
    expected = {ATTENTION: 1, ROTARY: 2, RMS_NORMS: 2, PROJECTIONS: 2}
    assert {name: count for name, count in places.items() if count} == {
        name: count for name, count in expected.items() if name in chosen
    }


def test_heads_that_share_keys_are_not_repeated(block, tmp_path):
    _, found, export = block
    inputs = normal(2, 5, 16), normal(1, 5, 2, seed=1)
    _, plain = run(found, write_variant(export)[0], tmp_path, inputs)
    _, fused = run(found, write_variant(export, [ATTENTION, ROTARY, PROJECTIONS])[0], tmp_path, inputs)
    assert (plain["Attention"], plain["RotaryEmbedding"], plain["RMSNormalization"]) == (0, 0, 2)
    assert (fused["Attention"], fused["RotaryEmbedding"], fused["RMSNormalization"]) == (1, 2, 2)
    assert (plain["MatMul"], fused["MatMul"]) == (9, 4)


class Turned(nn.Module):
    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotary(x, cos, sin)


def test_table_with_possibly_unequal_halves_stays_apart(tmp_path):
    inputs = normal(2, 3, 5, 8), normal(1, 1, 5, 8, seed=1), normal(1, 1, 5, 8, seed=2)
    found, export = exported(Turned(), inputs)
    written, places = write_variant(export, [ROTARY])
    assert places[ROTARY] == 0
    result, _ = run(found, written, tmp_path, inputs)
    # Two products and a sum.
    np.testing.assert_allclose(result, Turned()(*inputs), rtol=1e-5, atol=1e-6)


class Returned(nn.Module):
    """Returns one of its projections as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 5), nn.Linear(4, 2, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(x).relu().sum(-1) + self.c(x).exp().sum(-1)


def test_projections_that_are_outputs_or_lack_bias_stay_apart():
    _, export = exported(seeded(Returned), (normal(3, 4),))
    assert write_variant(export, [PROJECTIONS])[1][PROJECTIONS] == 0


def test_weights_keep_the_names_of_the_model(block):
    _, _, export = block
    written, _ = write_variant(export)
    assert {"q.weight_transposed", "down.weight_transposed", "norm.weight"} <= set(written.graph.initializers)
    names = [node.name for node in written.graph]
    assert len(set(names)) == len(names)
    assert {"q/MatMul", "down/MatMul", "norm/RMSNormalization"} <= set(names)
    assert not any(name.startswith("_empty") for name in names)
