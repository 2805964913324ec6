"""Any pipeline that tools/fuzz draws keeps the numbers of any transformer it draws; programs print the same twice."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from lissom.frontends.capture.export import capture
from tools.fuzz.case import Case, drawn, run
from tools.fuzz.models import build, draw_inputs

# Four models in the usual profile, 80 in the nightly one: a model is captured once for all its pipelines.
MODELS = settings.default.max_examples // 25


@st.composite
def cases(draw: st.DrawFn) -> Case:
    model = random.Random(f"model {draw(st.integers(0, MODELS - 1))}")
    return dataclasses.replace(drawn(model, draw(st.randoms(use_true_random=False))), captured_before=True)


@settings(max_examples=settings.default.max_examples // 4)
@given(case=cases())
def test_any_pipeline_keeps_the_numbers(case: Case) -> None:
    outcome = run(case)
    event(outcome.kind)
    assert outcome.kind in ("equal", "refused"), f"{outcome.detail}\npython -m tools.fuzz --replay '{case.to_json()}'"


@pytest.mark.slow
@settings(max_examples=3)
@given(case=cases())
def test_a_program_prints_the_same_again(case: Case) -> None:
    model, call = build(case.spec), case.example
    inputs = draw_inputs(case.spec, call.batch, call.length, call.padding, call.seed)
    first, again = (capture(model, (), inputs).program for _ in range(2))
    assert first.text() == first.copy().text() == again.text()
