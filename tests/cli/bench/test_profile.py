"""Tests of lissom.cli.bench.profile: every call is timed once, and the parts add up to the whole."""

import pytest
import torch

import lissom
from lissom.cli.bench.profile import Part, Profile, profile, profile_model, profile_table
from lissom.cli.bench.workload import parse_shapes
from lissom.compiler.analysis.cost import total_cost
from lissom.inspect.tables import plain
from tests.frontends.models.test_huggingface import directory  # noqa: F401
from tests.measure.test_machine import example
from tests.support.models import FeedForward

MACHINE = example()


def test_every_call_is_timed_with_work_of_program(directory):  # noqa: F811
    (found,) = profile_model(
        str(directory), passes="exact", shapes=parse_shapes("3x7"), texts=None, machine=MACHINE, seconds=0.0
    )
    assert found.title == "BertModel on eager, batch 3, sequence 7"
    assert all(part.milliseconds > 0 for part in found.parts)
    assert found.whole_ms == pytest.approx(found.between_ms + sum(part.milliseconds for part in found.parts))


def test_parts_hold_all_calls_and_operations_of_program():
    compiled = lissom.compile(FeedForward(), {"x": torch.randn(2, 5, 8)}, checks="off")
    found = profile(compiled, {"x": torch.randn(3, 7, 8)}, {}, MACHINE, 0.0)
    assert sum(part.calls for part in found.parts) == len(compiled.program.nodes())
    assert sum(part.flops for part in found.parts) == total_cost(compiled.program, {"batch": 3, "sequence": 7}).flops > 0


def test_the_table_sets_time_against_the_roof():
    parts = (
        Part("attention", "linear", 4, 6.0, 2e9, 8e6, 3.0),
        Part("attention", "softmax", 2, 1.0, 0.0, 1e6, 0.1),
        Part("norm", "layer_norm", 1, 1.0, 0.0, 2e6, 0.2),
    )
    shown = [" ".join(line.split()) for line in plain(profile_table(Profile("Model", 10.0, parts))).splitlines()]
    assert "attention 6 7 70.0 2 9 3.1 2.26" in shown
    assert "linear 4 6 60.0 2 8 3 2" in shown
    assert "between operators (dispatch) 2 20.0" in shown
    assert "a whole call 7 10 100.0 2 11 3.3 3.03" in shown


def test_call_faster_than_its_parts_shows_as_it_is():
    shown = plain(profile_table(Profile("Model", 1.0, (Part("norm", "layer_norm", 1, 1.5, 0.0, 1e6, 0.1),))))
    assert "-0.500" in shown
