"""Tests of the report: verdicts, the table, the picture."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lissom.errors import UnsupportedError
from lissom.tuning.candidates import Aim, Candidate
from lissom.tuning.report import TuneReport, shortened
from lissom.tuning.sites import Group

EXACT = Candidate("exact", "eager", 10.0, 10.0, 10.0, 100)
FASTER = Candidate("quantize", "eager", 5.0, 4.8, 5.3, 30, drop=0.004)
SLOWER = Candidate("quantize{scheme=int8-weight}", "eager", 8.0, 7.9, 8.2, 30, drop=0.005)
WORSE = Candidate('prune-heads{amounts="a=2"}', "eager", 4.0, 3.9, 4.1, 80, drop=0.3, predicted_cost=4.4, predicted_drop=0.2)
FAILED = Candidate("prune-layers", "eager", failed="PassError: it broke")


def report(aim: Aim) -> TuneReport:
    candidates = (EXACT, FASTER, SLOWER, WORSE, FAILED)
    group = Group("a", "attention", 4, ["a"])
    return TuneReport("Model", aim, candidates, aim.choose(candidates), True, ("a note",), (group,))


def test_fastest_within_bound_is_chosen_and_others_have_reason():
    found = report(Aim(False, 0.01))
    assert found.chosen is FASTER
    assert [found.verdict(item) for item in found.candidates] == [
        "2.00 x the time of the chosen one, on the frontier",
        "chosen",
        "1.60 x the time of the chosen one",
        "loses 0.3, allowed 0.01",
        "failed: PassError: it broke",
    ]
    assert [item.pipeline for item in found.frontier] == [WORSE.pipeline, "quantize", "exact"]


def test_equally_fast_programs_are_chosen_by_smallest_drop():
    alike = Candidate("int8", "eager", 5.08, 5.0, 5.2, 30, drop=0.001)
    candidates = (EXACT, FASTER, alike)
    found = TuneReport("Model", Aim(False, 0.01), candidates, Aim(False, 0.01).choose(candidates), True)
    assert found.chosen is alike
    assert found.verdict(FASTER) == "0.98 x the time of the chosen one, with a larger drop, on the frontier"
    assert Aim(True, 0.01).choose((EXACT, FASTER, replace(alike, bytes=31))) is FASTER
    assert Aim(False, 0.01).choose((EXACT, replace(FASTER, milliseconds=9.9))) is EXACT


def test_the_most_accurate_that_reaches_a_target_is_chosen():
    found = report(Aim(False, 0.0, target=8.5))
    assert found.chosen is FASTER
    assert found.verdict(EXACT) == "misses the target: 10 ms of 8.5 ms"
    assert report(Aim(True, 0.0, target=50)).verdict(WORSE) == "misses the target: 8e-05 MB of 5e-05 MB"


def test_without_a_fitting_candidate_the_nearest_miss_is_known():
    aim = Aim(False, 0.001)
    assert aim.choose([EXACT, WORSE]) is EXACT
    assert aim.nearest_miss([EXACT, WORSE, FAILED]) is WORSE
    assert aim.nearest_miss([EXACT, FAILED]) is None
    assert Aim(False, 0.0, target=2.0).choose([EXACT, FASTER]) is EXACT


def test_the_table_has_predictions_measurements_and_verdicts():
    text = str(report(Aim(False, 0.01)))
    assert "tune Model: 2.00 x faster, drop 0.004" in text
    assert "4.4" in text and "0.2" in text
    assert "- a note" in text
    assert "4 of 4" in text
    assert text.rstrip().endswith("backend eager, passes:\nquantize")


@pytest.mark.parametrize("aim", [Aim(False, 0.01), Aim(True, 0.01), Aim(False, 0.0, target=8.5)], ids=str)
def test_the_picture_is_drawn(aim, tmp_path):
    report(aim).plot("pareto", tmp_path / "frontier.svg")
    assert "chosen" in (tmp_path / "frontier.svg").read_text() or (tmp_path / "frontier.svg").stat().st_size > 1000
    with pytest.raises(UnsupportedError, match="ends in no format of a picture"):
        report(aim).plot("pareto", tmp_path / "frontier.txt")


def test_long_options_are_left_out():
    pipeline = 'prune-heads{amounts="encoder.layer.0.attention.self=8"},distill{steps=9},cast,sink-casts,fold-casts,quantize'
    assert shortened(pipeline) == "prune-heads{…}, distill{steps=9}, bf16, quantize"
    assert shortened("exact") == "exact"
