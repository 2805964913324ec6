"""The recipe `exact` on real architectures whose attention is written out in parts."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.passes import PASSES, RECIPES
from tests.support.harness import aten, calls
from tests.support.neighbours import all_but_slow
from tests.support.written_attention import EAGER, case_of, compiled, optimized


@pytest.mark.parametrize("name", all_but_slow(EAGER, "bert", "llama", "gemma3"))
def test_every_attention_is_raised(name: str) -> None:
    fast, attentions = optimized(name), EAGER[name][1]
    assert calls(fast.program, aten.scaled_dot_product_attention.default) == attentions
    assert calls(fast.program, aten.softmax.int, aten._softmax.default) == 0


@pytest.mark.parametrize("name", all_but_slow(EAGER, *(EAGER.keys() - {"whisper", "mpnet"})))
def test_nothing_is_skipped(name: str) -> None:
    assert [skip for step in optimized(name).report.history.steps for skip in step.skipped] == []


@pytest.mark.parametrize("name", ["llama", "t5", "gemma3"])
def test_every_norm_is_raised(name: str) -> None:
    program = optimized(name).program
    assert calls(program, aten.rms_norm.default) > 0
    assert calls(program, aten.rsqrt.default) == 0


@pytest.mark.parametrize("name", ["gpt2", "bloom", "t5"])
def test_every_activation_is_raised(name: str) -> None:
    program = optimized(name).program
    assert calls(program, aten.gelu.default) == EAGER[name][1]
    assert calls(program, aten.tanh.default) == 0


@pytest.mark.parametrize("name", all_but_slow(EAGER, *(EAGER.keys() - {"mpnet"})))
def test_numbers_at_two_other_sizes(name: str) -> None:
    fast, case = compiled(name), case_of(name)
    signature = fast.program.signature
    example = signature.flatten(case.args, case.kwargs)
    for grown in (1, 3):
        sizes = {symbol: size + grown for symbol, size in signature.sizes_of(example).items()}
        args, kwargs = signature.arguments(signature.resize(example, sizes, seed=grown))
        with torch.no_grad():
            wanted = case.model(*args, **kwargs)
        found = fast(*args, **kwargs)
        assert type(found) is type(wanted)
        for left, right in zip(pytree.tree_leaves(wanted), pytree.tree_leaves(found), strict=True):
            # Two layers of float32 in another order of summation: some 1e-6 on values of order 1.
            torch.testing.assert_close(right, left, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", EAGER)
def test_a_second_run_changes_nothing(name: str) -> None:
    program = optimized(name).program
    again, history = Pipeline(parse_pipeline("exact", PASSES, RECIPES), checks="off").run(program)
    assert again.text() == program.text()
    assert [step.rewritten for step in history.steps] == [0] * len(history.steps)
