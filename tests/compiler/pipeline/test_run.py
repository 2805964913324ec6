"""Tests of lissom.compiler.pipeline.run: exact passes in a row are compared once, and the wrong one among them is found."""

from __future__ import annotations

import pytest

from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import check_samples
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.errors import VerifyError
from tests.compiler.pipeline.test_pipeline import refusal, run
from tests.support.models import capture_of, captured
from tests.support.passes import DoubleGelu, DoubleNegation, DropDropout, ScaleWeights, StopsHalfway


def test_exact_passes_in_a_row_are_compared_once():
    passes = DropDropout(), DropDropout(), ScaleWeights(factor=0.5), DropDropout()
    _, history = run(captured("feed_forward"), *passes)
    assert [step.relative_error for step in history.steps[1:3]] == [0.0, 0.0]
    _, history = run(captured("bert"), DropDropout(), DoubleNegation(), name="bert")
    assert [step.relative_error for step in history.steps[1:]] == [None, 0.0]
    assert history.steps[-1].cosine == 1.0
    _, history = run(captured("bert"), DropDropout(), DoubleNegation(), name="bert", checks="each")
    assert [step.relative_error for step in history.steps[1:]] == [0.0, 0.0]


@pytest.mark.parametrize("checks", ["numeric", "each"])
def test_the_wrong_pass_among_exact_ones_is_found(checks):
    passes = DropDropout(), DoubleGelu(), DoubleNegation()
    error = refusal(VerifyError, captured("bert"), *passes, name="bert", checks=checks)
    assert str(error).startswith("double-gelu was rolled back: its outputs differ from the program before by ")
    assert [step.spelling for step in error.history.steps] == ["capture", "drop-dropout"]


def test_an_error_after_a_wrong_pass_names_the_wrong_pass():
    error = refusal(VerifyError, captured("feed_forward"), DoubleGelu(), StopsHalfway())
    assert str(error).startswith("double-gelu was rolled back")
    assert len(error.history.steps) == 1


def test_a_copy_that_a_pass_left_as_it_was_serves_the_next(monkeypatch):
    program, copied, copy = captured("bert"), list[Program](), Program.copy
    text, samples = program.text(), check_samples(program.signature, capture_of("bert").example)
    monkeypatch.setattr(Program, "copy", lambda self: copied.append(self) or copy(self))
    passes = [DropDropout(), DropDropout(), DropDropout(), DoubleNegation(), DropDropout()]
    after, history = Pipeline(passes, samples=samples).run(program)
    assert len(copied) == 3  # for the first pass, for the second to the fourth, and for the last
    assert text != history.texts[1] == history.texts[2] == history.texts[3] != history.texts[4]
    assert after.text() == history.texts[4] == history.texts[5] and program.text() == text
