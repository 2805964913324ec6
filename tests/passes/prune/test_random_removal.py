"""Any pattern of heads and neurons removed from any architecture gives the masked program's outputs."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lissom
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.compiler.verify.divergence import compare, run_samples, tolerance_of
from lissom.compiler.verify.structure import verify_structure
from lissom.passes import PASSES
from tests.support.neighbours import all_but_slow
from tools.zoo.catalogue import entries
from tools.zoo.known import CANNOT_BE_CAPTURED
from tools.zoo.removal import REWRITES, canonical, expected_left, mask_randomly, read_columns

ENTRIES = {entry.name: entry for entry in entries()}
FEW = ("causal/llama", "hand-written/chunk")
MORE = (
    "masked/bert",
    *("causal/gpt2", "causal/bloom", "causal/falcon", "causal/gemma2", "causal/xlnet", "causal/mixtral", "masked/deberta-v2"),
    *("encoder-decoder/t5", "encoder-decoder/bart", "vision/swin", "vision/vit", "speech/whisper", "speech/hubert"),
    *("hand-written/packed-einsum", "hand-written/multi-query", "hand-written/folded-baddbmm", "hand-written/nn-transformer"),
)


@cache
def masked_source(name: str) -> tuple[Program, list[Sample]]:
    with torch.no_grad():
        return canonical(ENTRIES[name].build())


def check(program: Program, samples: list[Sample], seed: int) -> None:
    """Mask and remove one pattern: equal outputs, and as many units left as there have to be."""
    masked = program.copy()
    generator = random.Random(seed)
    dead = mask_randomly(masked, generator)
    found, _ = read_columns(masked)
    after, _ = Pipeline(parse_pipeline(REWRITES, PASSES), checks="off").run(masked)
    verify_structure(after, masked)
    with torch.no_grad():
        error = compare(run_samples(masked, samples), run_samples(after, samples)).relative_error
    # The removed terms were exact zeros; what is left is summed in another order.
    assert error <= tolerance_of(masked)
    left, _ = read_columns(after)
    for name, units in dead.items():
        columns, site = found[name]
        if len(units) == columns.count:
            assert name not in left
        elif units:
            assert left[name][0].count == columns.count - len(units) + expected_left(columns, site, units)
    if any(dead.values()):
        assert after.parameter_count < masked.parameter_count


@pytest.mark.parametrize("name", all_but_slow((*FEW, *MORE), *FEW))
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 2**20))
def test_a_random_pattern(name: str, seed: int) -> None:
    program, samples = masked_source(name)
    check(program, samples, seed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the models' libraries, at their import and in the models themselves
@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in CANNOT_BE_CAPTURED])
def test_every_model_gives_the_masked_outputs(name: str) -> None:
    with torch.no_grad():
        masked, samples = canonical(ENTRIES[name].build())
        mask_randomly(masked, random.Random(name))
        after, _ = Pipeline(parse_pipeline(REWRITES, PASSES), checks="off").run(masked)
        error = compare(run_samples(masked, samples), run_samples(after, samples)).relative_error
    assert error <= tolerance_of(masked)


@pytest.mark.parametrize("backend", all_but_slow(["eager", "onnxruntime"], "eager"))
@pytest.mark.parametrize("name", all_but_slow(["masked/bert", "causal/llama"], "masked/bert"))
def test_what_is_left_is_lowered(name: str, backend: str) -> None:
    case = ENTRIES[name].build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in case.model.named_parameters():
            if key.endswith(("attention.output.dense.weight", "o_proj.weight")):
                weight.view(weight.shape[0], 4, -1)[:, ::2] = 0
            elif key.endswith(("output.dense.weight", "down_proj.weight")):
                weight[:, torch.rand(weight.shape[1], generator=generator) < 0.5] = 0
        wanted = case.model(*case.args, **case.kwargs)
        compiled = lissom.compile(case.model, case.inputs, passes=f"exact,{REWRITES}", backend=backend)
        found = compiled(*case.args, **case.kwargs)
    # Two layers of float32 in another order of summation: some 1e-6 on values of order 1.
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=2e-5)
    steps = {step.spelling: step for step in compiled.report.history.steps}
    assert steps["eliminate-dead"].rewritten > 0
