"""Tests of rotate{where=heads}: values and output projections against products written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.errors import RequirementError, UnsupportedError
from lissom.passes import PASSES
from lissom.passes.quantize.rotate.bases import hadamard, random_basis
from lissom.passes.quantize.rotate.rotate import Rotate
from tests.support import captures
from tests.support.harness import Calls, aten, rewrite
from tests.support.models import Case, normal, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5


def rotated(case: Case, **options: object):
    fast = captures.optimize(case.model, case.inputs)
    sample = fast.program.signature.flatten(case.args, case.kwargs)
    return fast.program, *Pipeline([Rotate(where="heads", **options)], samples=[sample]).run(fast.program)  # pyright: ignore


@pytest.mark.parametrize("build", [tiny_bert, tiny_gpt2, tiny_llama, tiny_t5])
def test_every_attention_is_rotated(build) -> None:
    _, _, history = rotated(build())
    step = history.steps[1]
    assert not step.skipped and step.rewritten > 0
    assert step.relative_error is not None and step.relative_error < 5e-6
    assert history.texts[0] == history.texts[1]


def test_numbers() -> None:
    """Grouped heads: v has fewer rows than the output projection has columns."""
    before, after, _ = rotated(tiny_llama(), basis="random")
    names = [name for name in before.weights() if "layers.0.self_attn" in name]
    (v,), (o,) = ([name for name in names if f"{part}_proj" in name] for part in "vo")
    old, new = ({name: program.weight(name).detach().double() for name in (v, o)} for program in (before, after))
    size = 4
    basis = random_basis(size, 0)
    # One rounding of each weight to float32.
    for start in range(0, len(old[v]), size):
        rows = slice(start, start + size)
        torch.testing.assert_close(new[v][rows], basis.T @ old[v][rows], rtol=1e-6, atol=1e-7)
    for start in range(0, old[o].shape[1], size):
        columns = slice(start, start + size)
        torch.testing.assert_close(new[o][:, columns], old[o][:, columns] @ basis, rtol=1e-6, atol=1e-7)


def gated(self: Calls, x: torch.Tensor) -> torch.Tensor:
    """An attention whose output is multiplied channel by channel before the output projection."""
    v, gate = (torch.nn.functional.linear(x, weight) for weight in (self.v, self.gate))
    q, heads = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (x, v))
    z = torch.nn.functional.scaled_dot_product_attention(q, q, heads).transpose(1, 2).flatten(2)
    return torch.nn.functional.linear(z * torch.sigmoid(gate), self.o)


def test_a_gate_between_heads_and_projection_is_reported() -> None:
    model = Calls(gated, v=normal(8, 8), gate=normal(8, 8, seed=2), o=normal(3, 8, seed=1))
    program, history = rewrite(Rotate(where="heads"), model, normal(2, 5, 8))
    assert history.texts[0] == history.texts[1] and len(program.nodes(aten.scaled_dot_product_attention.default)) == 1
    (skipped,) = history.steps[1].skipped
    assert skipped.reason.endswith("treats its channels one by one")


def test_quantization_comes_after() -> None:
    case = tiny_llama()
    fast = captures.optimize(case.model, case.inputs)
    with pytest.raises(RequirementError, match="rotate requires that weights of linear layers are floating point"):
        Pipeline(parse_pipeline("quantize,rotate{where=heads}", PASSES), checks="structural").run(fast.program)


def test_requirements() -> None:
    for options, sentence in (
        ({"where": "heads", "basis": "balanced"}, "rotate{where=heads} takes no basis=balanced, which is for where=cache"),
        ({"where": "cache", "basis": "pca"}, "rotate{where=cache} takes no basis=pca, which is for where=residual"),
    ):
        with pytest.raises(UnsupportedError) as refusal:
            rewrite(Rotate(**options), nn.Linear(8, 8), normal(2, 8))  # pyright: ignore
        assert sentence in str(refusal.value)


def test_sizes_without_hadamard_matrix_get_a_random_one() -> None:
    assert hadamard(6) is None
    assert torch.equal(Rotate()._basis(6), random_basis(6, 0))
