"""Tests of lissom.measure.timing."""

import time

import pytest

from lissom.measure.timing import Timing, apart, median_seconds, time_calls, time_once, time_runs


def test_timing_reads_as_median_and_middle_half():
    assert str(Timing(1.23456, 1.1, 2.0, 9)) == "1.23 (1.1 to 2)"
    assert str(Timing(1085.3, 999.6, 12345.6, 9)) == "1085 (1000 to 12346)"


def test_calls_warm_up_twice_and_run_in_turn():
    order = []
    found = time_calls({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.0)
    assert "".join(order) == "aabb" + "ab" * 5
    assert found["a"].runs == found["b"].runs == 5


def test_a_call_is_run_no_more_often_than_asked():
    found = time_calls({"a": lambda: None, "b": lambda: None}, seconds=60.0, most=20)
    assert found["a"].runs == found["b"].runs == 20


def test_time_is_measured_in_milliseconds():
    found = time_calls({"sleep": lambda: time.sleep(0.01)}, seconds=0.0)["sleep"]
    # A sleep never ends early; on a busy machine it may end late.
    assert 10.0 <= found.low_ms <= found.median_ms <= found.high_ms


def test_the_slower_call_takes_longer():
    found = time_calls({"short": lambda: None, "long": lambda: time.sleep(0.005)}, seconds=0.0)
    assert found["short"].median_ms < found["long"].median_ms


def test_calls_run_for_the_seconds_asked():
    started = time.perf_counter()
    found = time_calls({"sleep": lambda: time.sleep(0.001)}, seconds=0.1)["sleep"]
    assert time.perf_counter() - started >= 0.1
    assert found.runs > 5


def test_runs_without_warm_ups_count_from_the_first():
    order = []
    found = time_runs({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0)
    assert "".join(order) == "ab"
    assert [len(runs) for runs in found.values()] == [1, 1]


def test_one_run_is_timed_with_its_output():
    milliseconds, output = time_once(lambda: time.sleep(0.01) or "output")
    assert milliseconds >= 10.0 and output == "output"


def test_a_median_is_in_seconds():
    assert 0.001 <= median_seconds(lambda: time.sleep(0.001)) < 1.0


@pytest.mark.parametrize(
    ("fast", "slow", "expected"),
    [
        ([60.0, 62.0], [80.0, 82.0], True),
        ([60.0, 62.0], [70.0, 72.0], False),  # 14 % needs more than two runs
        ([60.0, 62.0] * 5, [70.0, 72.0] * 5, True),
        ([60.0, 71.0] * 5, [70.0, 72.0] * 5, False),  # they overlap
        ([0.1] * 10, [0.2] * 10, False),  # too short to tell
    ],
)
def test_calls_are_apart_where_no_runs_overlap(fast: list[float], slow: list[float], expected: bool):
    assert apart([fast, slow]) == apart([slow, fast]) == expected


def test_timing_ends_early_once_it_is_clear():
    seen: list[int] = []

    def enough(times):
        seen.append(len(times[0]))
        return seen[-1] == 3

    assert time_calls({"a": lambda: None, "b": lambda: None}, seconds=60.0, enough=enough)["b"].runs == 3
    assert seen == [2, 3]
