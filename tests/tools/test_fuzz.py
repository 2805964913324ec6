"""The campaign notices, reproduces and simplifies failures; tests/passes/test_properties.py runs cases of it."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

import lissom
from tests.support.neighbours import all_but_slow
from tools.fuzz import campaign, case, models, oracle
from tools.fuzz.case import Case, draw_case
from tools.fuzz.models import Spec, build, draw_inputs

FOUND = (Path(__file__).parent / "found.jsonl").read_text(encoding="utf-8").splitlines()
"""Cases that failed.

Right programs that the verifier refused: -1e4 added to scores in 16 bits, and rescaled weights. Passes that failed on scales of
quantized weights under `cast{dtype=fp16}`, on masks that a pass rewrote between two programs that are compared, and on
block-sparse attention in float16, and on the columns of an attention's only head.
"""


def test_a_number_is_the_same_case_each_time():
    assert [draw_case(number) for number in range(50)] == [draw_case(number) for number in range(50)]


def test_a_case_can_be_written_down_and_read_back():
    for number in range(50):
        assert Case.from_json(draw_case(number).to_json()) == draw_case(number)


@pytest.mark.parametrize("text", all_but_slow(FOUND, FOUND[1], FOUND[3]))
def test_what_a_campaign_found_stays_mended(text):
    outcome = case.run(Case.from_json(text))
    assert outcome.kind == "equal", outcome.detail


def test_a_model_has_the_same_weights_each_time():
    spec = models.draw_spec(random.Random(5))
    for one, other in zip(build(spec).parameters(), build(spec).parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("spec", [Spec(experts=6, top_k=2), Spec(experts=3, top_k=1, gate="packed", bias=True, neurons=5)])
def test_experts_can_be_pruned_where_tokens_are_sorted_by_expert(spec):
    example = draw_inputs(spec, 2, 5, "none", 0)["tokens"]
    optimized = lissom.optimize(build(spec), (example,), passes="prune-experts{keep=0.67}", data=[(example,)])
    (step,) = (step for step in optimized.report.history.steps if step.spelling.startswith("prune-experts"))
    assert step.skipped == () and "=" in step.per_site
    router = next(weight for name, weight in optimized.program.weights().items() if name.endswith("router.weight"))
    assert len(router) == round(0.67 * spec.experts)


@pytest.mark.parametrize("logits", ["full", "compact"])
def test_pruned_vocabularies_are_judged_on_ids_that_stay(logits):
    outcome = case.run(Case(Spec(output="several"), (f"prune-vocabulary{{keep=9,logits={logits}}}",), calls=()))
    assert outcome.kind == "equal", outcome.detail


def test_a_sorted_mixture_is_the_mixture_of_its_best_experts():
    spec = Spec(experts=5, top_k=2, gate="separate", bias=True)
    mixture = build(spec).layers[0].feed_forward.double()
    x = torch.randn(2, 3, spec.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros_like(x)
    with torch.no_grad():
        for place in torch.cartesian_prod(torch.arange(2), torch.arange(3)):
            token = x[tuple(place)]
            shares, best = mixture.router(token).softmax(-1).topk(2)
            for share, expert in zip(shares / shares.sum(), best, strict=True):
                gate, up = (mixture.up[expert] @ token).chunk(2)
                y = mixture.down[expert] @ (gate.relu() * up) + mixture.down_bias[expert]
                wanted[tuple(place)] += share * y
        # The same products in float64, summed in another order.
        assert torch.allclose(mixture(x), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes", "single"])
@pytest.mark.parametrize("mask", ["keep", "hide", "integers", "additive"])
def test_every_row_has_token_and_every_mask_says_same(mask, padding):
    spec = Spec(mask=mask, fill="smallest")
    inputs = draw_inputs(spec, 4, 6, padding, 3)
    kept = models.kept_tokens(spec, inputs["mask"])
    boolean = draw_inputs(Spec(mask="keep"), 4, 6, padding, 3)["mask"]
    assert torch.equal(kept, boolean)
    assert kept.any(1).all()


def test_an_exact_answer_that_is_off_is_noticed():
    model = build(Spec(layers=2, bias=True))
    inputs = draw_inputs(model.spec, 2, 5, "none", 0)["tokens"]
    with torch.no_grad():
        plain, precise = model(inputs), build(model.spec).double()(inputs)
    assert oracle.differs_from_float64([plain], [plain], [precise], None) is None
    wrong = plain.clone()
    wrong[1, 4] *= 1.01
    assert "is off by" in oracle.differs_from_float64([wrong], [plain], [precise], None)
    wrong[1, 4, 0] = float("nan")
    assert "not finite" in oracle.differs_from_float64([wrong], [plain], [precise], None)
    assert "in place of" in oracle.differs_from_float64([plain[:1]], [plain], [precise], None)


def test_tokens_that_do_not_count_may_differ():
    wanted = torch.randn(1, 3, 4, dtype=torch.float64)
    found = wanted.float()
    found[0, 2] = 9.0
    kept = torch.tensor([[True, True, False]])
    assert oracle.differs_from_float64([found], [wanted.float()], [wanted], kept) is None
    assert oracle.differs_from_float64([found], [wanted.float()], [wanted], None) is not None


def test_a_failure_is_made_simpler():
    spec = dataclasses.replace(models.draw_spec(random.Random(1)), layers=2, gate="packed")
    case = dataclasses.replace(draw_case(3), spec=spec, passes=("remove-no-ops", "quantize{scheme=fp8}", "cast"))

    def still(candidate: Case) -> str:
        wrong = candidate.spec.gate == "packed" and any(item.startswith("quantize") for item in candidate.passes)
        return "wrong" if wrong else "equal"

    found = campaign.shrink(case, "wrong", still, rounds=500)
    assert found.passes == ("quantize",)
    assert found.spec == Spec(gate="packed")
    assert found.calls == ()


def test_a_crash_and_a_raw_error_are_told_apart(monkeypatch):
    case = Case(Spec(), ())

    def end(case, address):
        import os

        os.abort()

    def fail(*arguments):
        raise KeyError("layers")

    monkeypatch.setattr("tools.fuzz.case.run", end)
    assert campaign.run_apart(case).kind == "crash"
    monkeypatch.undo()
    monkeypatch.setattr("tools.fuzz.case._judge", fail)
    outcome = campaign.run_apart(case)
    assert outcome.kind == "traceback"
    assert "KeyError: 'layers'" in outcome.detail
