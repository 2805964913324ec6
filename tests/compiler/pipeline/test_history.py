"""Tests of lissom.compiler.pipeline.history."""

import json

import pytest

from lissom.compiler.ir.editor import Skip
from lissom.compiler.pipeline.history import FORMAT_VERSION, History, Size, Step, changed_calls
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.errors import UnsupportedError
from tests.support.models import capture_of, captured
from tests.support.passes import DropDropout, Marks, ScaleWeights

SIZE = Size(nodes=6, parameters=228, parameter_bytes=912, flops=3840)


def step(rewritten: int = 0, *reasons: str) -> Step:
    skipped = tuple(Skip(f"node_{index}", f"'node_{index}'", reason) for index, reason in enumerate(reasons))
    return Step(1, "some-pass", "rewrite", 0.0, 0.0, SIZE, rewritten=rewritten, skipped=skipped)


@pytest.fixture(scope="module")
def history():
    found = capture_of("feed_forward")
    passes = [DropDropout(), ScaleWeights(factor=0.5), Marks()]
    return Pipeline(passes, samples=[found.example]).run(found.program)[1]


def test_a_size_counts_nodes_elements_bytes_and_operations():
    # Two products of 2·5 rows with an 8 by 12 matrix, a multiplication and an addition for each element.
    assert Size.of(captured("feed_forward")) == Size(nodes=6, parameters=228, parameter_bytes=912, flops=2 * 2 * 10 * 96)


@pytest.mark.parametrize(
    ("found", "summary"),
    [
        (step(), "nothing to do"),
        (step(3), "rewrote 3"),
        (step(10, "mask is not additive", "mask is not additive"), "rewrote 10 of 12; skipped 2: mask is not additive (2)"),
        (step(0, "odd", "wide", "odd"), "rewrote 0 of 3; skipped 3: odd (2), wide"),
    ],
)
def test_a_step_is_summed_up_in_words(found, summary):
    assert found.summary == summary


def test_json_round_trips(history):
    whole = history.to_json()
    assert json.loads(json.dumps(whole)) == json.loads(json.dumps(history.to_json()))
    assert list(whole) == ["version", "pipeline", "checks", "steps"]
    assert whole["version"] == FORMAT_VERSION
    assert whole["pipeline"] == "drop-dropout,scale-weights{factor=0.5},marks"


def test_json_holds_every_field_of_every_step(history):
    first, drop, scale, _ = json.loads(json.dumps(history.to_json()))["steps"]
    assert first["spelling"] == "capture"
    assert first["size"] == {"nodes": 6, "parameters": 228, "parameter_bytes": 912, "flops": 3840}
    assert drop["summary"] == "rewrote 1 of 2; skipped 1: a norm is no dropout"
    assert drop["skipped"][0]["node"] == "layer_norm"
    assert drop["skipped"][0]["place"].startswith("'layer_norm' (aten.layer_norm, in norm, models.py:")
    assert (drop["added"], drop["removed"]) == (0, 1)
    assert scale["kind"] == "approximation"
    assert 0 < scale["relative_error"] < 1


def test_a_diff_shows_what_changed_between_two_steps(history):
    assert history.diff(0, 1).splitlines() == [
        "--- 0 capture",
        "+++ 1 drop-dropout",
        "@@ -11,4 +11,3 @@",
        "   %linear_1: f32[batch, sequence, 8] = aten.linear(%gelu, @down.weight, @down.bias)  # down",
        "-  %dropout: f32[batch, sequence, 8] = aten.dropout(%linear_1, 0.5, False)  # dropout",
        "-  %add: f32[batch, sequence, 8] = aten.add.Tensor(%x, %dropout)",
        "+  %add: f32[batch, sequence, 8] = aten.add.Tensor(%x, %linear_1)",
        "   return [%add]",
    ]


def test_a_diff_may_go_backwards(history):
    assert "+  %dropout" in history.diff(1, 0)


def test_diff_of_steps_with_same_program_is_empty(history):
    assert history.diff(1, 1) == ""
    assert history.diff(1, 3) == ""


@pytest.mark.parametrize("steps", [(0, 9), (-1, 0)])
def test_a_step_that_is_not_there_is_refused(history, steps):
    wrong = next(index for index in steps if index not in range(4))
    with pytest.raises(UnsupportedError) as caught:
        history.diff(*steps)
    assert str(caught.value) == f"there is no step {wrong}; this history has steps 0 (capture) to 3"


def test_changes_are_counted_by_name():
    assert changed_calls(["a", "b", "c"], ["b", "d"]) == (1, 2)


def test_an_empty_history_has_no_steps():
    assert History("", "numeric").to_json()["steps"] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seconds": "x"}, "'x' is not a number"),
        ({"notes": ["a", 3]}, "3 is not text"),
        ({"reverted": 7}, "7 is not text"),
        ({"kind": 7}, "the field 'kind' is 7"),
        ({"index": -1}, "-1 is negative"),
        ({"relative_error": [1.0]}, r"\[1\.0\] is not a number"),
        ({"skipped": [{"node": 1, "place": "", "reason": ""}]}, "the field 'node' is 1"),
        ({"curve": [{"step": 0, "seconds": 0.0, "loss": None, "held_out": None}]}, "None is not a number"),
        ({"curve": 3}, "the field 'curve' is 3"),
        ({"size": {"nodes": "x", "parameters": 1, "parameter_bytes": 1, "flops": 1}}, "the field 'nodes' is 'x'"),
        ({"size": [1, 2, 3, 4]}, "the field 'size' is "),
        ({"more": 1}, "there is an unknown field 'more'"),
    ],
)
def test_a_step_of_another_type_is_refused(history, change, said):
    data = json.loads(json.dumps(history.to_json()))
    data["steps"][1] |= change
    with pytest.raises(ValueError, match=said):
        History.from_json(data, history.texts)


def test_texts_of_another_type_are_refused(history):
    data = history.to_json()
    assert History.from_json(data, history.texts).steps == history.steps
    with pytest.raises(ValueError, match="7 is not text"):
        History.from_json(data, [7, *history.texts[1:]])
    for name in ("pipeline", "checks"):
        with pytest.raises(ValueError, match=f"the field '{name}' is 7"):
            History.from_json({**data, name: 7}, history.texts)
    with pytest.raises(ValueError, match="the field 'steps' is 7"):
        History.from_json({**data, "steps": 7}, history.texts)
