"""Tests of untie-lm-head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import lissom
from lissom.compiler.analysis.structure.transformer import structure
from tests.support import captures
from tests.support.harness import check_golden, rewrite
from tests.support.models import VOCABULARY, Tied, normal, seeded, tied_llama

pytestmark = pytest.mark.usefixtures("shared_captures")
TOKENS = torch.tensor([[1, 2, 3, 5, 8, 13]])


def tied() -> nn.Module:
    return seeded(lambda: Tied(32))


def test_rewrites() -> None:
    program, history = rewrite("untie-lm-head", tied(), TOKENS)
    check_golden("untie_lm_head", history.diff(0, 1))
    (item,) = program.fact(structure).embeddings
    assert not item.tied


def test_table_and_head_are_one_memory_until_one_changes() -> None:
    module = tied()
    program, _ = rewrite("untie-lm-head", module, TOKENS)
    places = {weight.data_ptr() for name, weight in program.weights().items() if weight.shape == (VOCABULARY, 32)}
    assert len(places) == 1
    assert torch.equal(program(TOKENS), module(TOKENS))


@pytest.mark.parametrize("build", [tied, tied_llama])
def test_table_and_head_have_formats_of_their_own(build: Callable[[], nn.Module]) -> None:
    model = build()
    passes = "untie-lm-head,quantize{scheme=int4-weight,lm_head=true},quantize{scheme=int8-weight,embeddings=true},gptq"
    found = captures.optimize(model, TOKENS, passes=f"{passes},fold-quantized-weights", data=[TOKENS]).program
    stored = {weight.dtype for weight in found.weights().values() if weight.dim() == 2 and not weight.is_floating_point()}
    assert stored == {torch.int8, torch.uint8}


def test_table_that_is_quantized_already_is_left_with_reason() -> None:
    passes = "quantize{scheme=int8-weight,embeddings=true},untie-lm-head"
    step = captures.optimize(tied(), TOKENS, passes=passes).report.history.steps[-1]
    assert [skip.reason for skip in step.skipped] == [
        "what it reads of its table is read elsewhere too; untie it before quantize"
    ]


def test_a_head_that_is_no_module_is_untied() -> None:
    """Found by tools/fuzz: logits computed in the model's own `forward` have no module path."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCABULARY, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.table(ids).tanh(), self.table.weight)

    module = seeded(Whole)
    program, _ = rewrite("untie-lm-head", module, TOKENS)
    assert set(program.weights()) == {"table.weight", "weight_untied"}
    assert torch.equal(program(TOKENS), module(TOKENS))


def test_leaves_other_programs_alone() -> None:
    _, history = rewrite("untie-lm-head", seeded(lambda: nn.Linear(8, 8)), normal(2, 8))
    assert history.texts[0] == history.texts[1]


def test_an_untied_decoder_generates_as_before() -> None:
    model = tied_llama()
    plain = lissom.compile_generation(model, max_length=16)
    found = lissom.compile_generation(model, max_length=16, passes="untie-lm-head")
    wanted = plain.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert torch.equal(found.generate(TOKENS, max_new_tokens=4, do_sample=False), wanted)
