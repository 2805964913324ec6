"""Tests of lissom.backends.onnx.export and attention: the file, which runs without Lissom."""

from __future__ import annotations

import importlib
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

from lissom.backends.names import input_names, output_names
from lissom.backends.onnx.export import export_onnx, save_onnx
from lissom.backends.onnx.variants import ATTENTION, CHOICES, write_variant
from lissom.frontends.capture.export import capture
from lissom.ops import attention, rotary
from tests.support.models import CASES, capture_of, normal, seeded
from tests.support.neighbours import all_but_slow

EXPORTS = {}


def export(found, decompose=False):
    """The export of a capture, made once: it takes seconds."""
    key = found.program, decompose
    if key not in EXPORTS:
        EXPORTS[key] = export_onnx(found.program, found.example, decompose)
    return EXPORTS[key]


def exported(found, folder, chosen=(), decompose=False):
    """The path of the model's file in one of its forms."""
    return save_onnx(write_variant(export(found, decompose), chosen)[0], folder)


def run_plainly(found, path, inputs):
    """What a plain session of ONNX Runtime gives for the file."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(input_names(found.program), (x.numpy() for x in inputs), strict=True)))


FORMS = {"written out": (), "fused": tuple(CHOICES)}
QUICK = ("feed_forward", "nested", "tied", "bert")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", all_but_slow([name for name in CASES if name != "counter"], *QUICK))
def test_the_file_passes_the_checker_and_shape_inference(name, form, tmp_path):
    path = exported(capture_of(name), tmp_path, FORMS[form], decompose=True)
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert all(node.domain in ("", "com.microsoft") for node in model.graph.node)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def test_names_are_those_of_the_program(tmp_path):
    model = onnx.load(exported(capture_of("bert"), tmp_path, decompose=True))
    assert [item.name for item in model.graph.input] == ["input_ids", "attention_mask"]
    assert [item.name for item in model.graph.output] == ["last_hidden_state", "pooler_output"]
    sizes = [size.dim_param for size in model.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", "sequence"]
    assert {item.name for item in model.graph.initializer} >= {"embeddings.word_embeddings.weight", "pooler.dense.weight"}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert "encoder.layer.1.attention.self/Softmax" in names


def test_nested_inputs_and_outputs_are_named_by_their_place():
    program = capture_of("nested").program
    assert input_names(program) == ["past_layer_0", "past_layer_1"]
    assert output_names(program) == ["past_layer_0_1", "past_layer_1_1", "sum_0"]


class Returns(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"doubled": 2 * x, "given": x}


def test_an_input_that_is_returned_keeps_its_name(tmp_path):
    found = capture(Returns(), (normal(2, 3),))
    path = exported(found, tmp_path)
    model = onnx.load(path)
    assert [item.name for item in (*model.graph.input, *model.graph.output)] == ["x", "doubled", "given"]
    x = normal(4, 5)
    for one, other in zip(run_plainly(found, path, [x]), found.program.run([x]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_plain_session_runs_the_file_at_other_sizes(tmp_path):
    found = capture_of("feed_forward")
    path = exported(found, tmp_path)
    for shape in ((1, 1, 8), (3, 7, 8)):
        x = normal(*shape)
        # Two products of float32 with sums of at most 12 terms, unit roundoff 6e-8.
        np.testing.assert_allclose(run_plainly(found, path, [x])[0], found.program.run([x])[0].detach(), rtol=1e-5, atol=1e-6)


class Heads(nn.Module):
    """Projects, attends with what it is given, and projects back."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.options = options

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (item.unflatten(-1, (4, 4)).transpose(1, 2) for item in self.qkv(x).chunk(3, -1))
        found = functional.scaled_dot_product_attention(q, k, v, mask, **self.options)
        return self.out(found.transpose(1, 2).flatten(2))


def masks() -> dict[str, torch.Tensor | None]:
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    blind = seen.clone()
    blind[0, :, :2] = False
    return {
        "none": None,
        "rows": seen,
        "blind rows": blind,
        "padding": blind[:, :, 4:],
        "two dimensions": seen[0, 0],
        "three dimensions": seen[0],
        "added": normal(2, 1, 5, 5),
        "added, blind rows": torch.zeros(2, 1, 5, 5).masked_fill(~blind, -torch.inf),
        "added by head": normal(1, 4, 5, 5),
        "lowest numbers": torch.zeros(2, 1, 5, 5).masked_fill(~blind, torch.finfo(torch.float32).min),
    }


@pytest.mark.parametrize("kind", all_but_slow(masks(), "three dimensions", "blind rows", "added by head"))
def test_attention_with_every_kind_of_mask(kind, tmp_path):
    mask = masks()[kind]
    inputs = (normal(2, 5, 16), mask) if mask is not None else (normal(2, 5, 16),)
    check_attention(seeded(Heads), inputs, tmp_path)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.3}], ids=str)
def test_attention_with_every_option(options, tmp_path):
    check_attention(seeded(lambda: Heads(**options)), (normal(2, 5, 16),), tmp_path)


def check_attention(model, inputs, folder):
    """Both forms give what the model gives; a mask that differs by head and may hide all is not fused."""
    found = capture(model, inputs)
    wanted = model(*inputs).detach()
    by_head = len(inputs) > 1 and inputs[1].dim() == 4 and inputs[1].shape[1] > 1
    assert write_variant(export(found), [ATTENTION])[1][ATTENTION] == int(not by_head)
    for chosen in ((), (ATTENTION,)):
        path = exported(found, folder, chosen)
        onnx.checker.check_model(path, full_check=True)
        # Sums of at most 16 terms of float32, unit roundoff 6e-8.
        np.testing.assert_allclose(run_plainly(found, path, found.example)[0], wanted, rtol=1e-5, atol=1e-6)


def test_a_fused_attention_is_one_node_without_transpositions(tmp_path):
    found = capture(seeded(Heads), (normal(2, 5, 16),))
    model = onnx.load(exported(found, tmp_path, [ATTENTION]))
    count = Counter(node.op_type for node in model.graph.node)
    assert count["MultiHeadAttention"] == 1
    assert count["Transpose"] == 0
    assert count["Softmax"] == 0


def test_a_mixture_of_experts(tmp_path):
    operator = importlib.import_module("transformers.integrations.moe") and torch.ops.transformers.grouped_mm_fallback

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 6))

        def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            return operator(x, self.weight, ends)

    model = seeded(Experts)
    found = capture(model, (normal(7, 4), torch.tensor([2, 2, 5])))
    path = exported(found, tmp_path)
    onnx.checker.check_model(path, full_check=True)
    # An expert without rows; rows behind the last; all rows to one.
    for rows, ends in ((7, [2, 2, 5]), (9, [0, 4, 9]), (5, [0, 0, 5])):
        inputs = [normal(rows, 4), torch.tensor(ends)]
        # Sums of 4 terms of float32, unit roundoff 6e-8.
        np.testing.assert_allclose(run_plainly(found, path, inputs)[0], model(*inputs).detach(), rtol=1e-5, atol=1e-6)


class Capped(nn.Module):
    """Attention with soft-capped scores and, unless told otherwise, a sink for every head."""

    def __init__(self, with_sinks: bool = True) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(1, 2, 1, 1)) if with_sinks else None

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, mask, scale=0.5, softcap=2.0, sinks=self.sinks)


class Grouped(nn.Module):
    """Four heads of queries share two heads of keys and values."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Filled(nn.Module):
    """Chooses between truths, which ONNX Runtime cannot by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        large, positive = x.abs() > 1, x > 0
        return torch.where(large, positive, ~positive.masked_fill(large, True))


class Turned(nn.Module):
    """Rotary position embedding."""

    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.interleaved = interleaved

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotary(x, cos, sin, interleaved=self.interleaved)


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (Capped, (*(normal(2, 2, 5, 8, seed=seed) for seed in range(3)), torch.ones(5, 5, dtype=torch.bool).tril())),
        (lambda: Capped(False), (*(normal(2, 2, 5, 8, seed=seed) for seed in range(3)), masks()["added, blind rows"])),
        (Grouped, (normal(2, 4, 5, 8), normal(2, 2, 6, 8, seed=1), normal(2, 2, 6, 8, seed=2))),
        (Filled, (normal(3, 4),)),
        (lambda: Turned(False), (normal(2, 2, 5, 8), normal(5, 8, seed=1), normal(5, 8, seed=2))),
        (lambda: Turned(False), (normal(2, 2, 5, 8), normal(5, 4, seed=1), normal(5, 4, seed=2))),
        (lambda: Turned(True), (normal(2, 2, 5, 8), normal(5, 8, seed=1), normal(5, 8, seed=2))),
        (lambda: Turned(True), (normal(2, 2, 5, 8), normal(5, 4, seed=1), normal(5, 4, seed=2))),
    ],
    ids=[
        "softcap and sinks",
        "softcap and blind rows",
        "grouped",
        "truths",
        "halves",
        "halves, one angle a pair",
        "neighbours",
        "neighbours, one angle a pair",
    ],
)
def test_operators_of_our_own(build, inputs, tmp_path):
    model = seeded(build)
    found = capture(model, inputs)
    path = exported(found, tmp_path, [ATTENTION])
    onnx.checker.check_model(path, full_check=True)
    # Sums of at most 8 terms of float32, unit roundoff 6e-8.
    np.testing.assert_allclose(run_plainly(found, path, found.example)[0], model(*inputs).detach(), rtol=1e-5, atol=1e-6)
