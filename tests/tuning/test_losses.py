"""Tests of the loss table: what it holds, and how much smaller errors are on the batches of calibration."""

from __future__ import annotations

import pytest

import lissom
from lissom.tuning.clock import Clock
from lissom.tuning.divergence import Divergence
from lissom.tuning.losses import LossMeter
from lissom.tuning.sites import Option, groups_of, linear_paths
from lissom.tuning.store import Store
from lissom.tuning.tuned import _too_little
from tests.support.models import feed_forward, normal


def test_losses_are_smaller_on_the_batches_of_calibration():
    case = feed_forward()
    program = lissom.optimize(case.model, case.inputs, checks="off").program
    groups = groups_of(program)
    samples = [program.signature.flatten((normal(*case.args[0].shape, seed=seed),), {}) for seed in range(2)]
    judged = Divergence(program, samples[:1])
    meter = LossMeter(program, groups, linear_paths(program), samples[1:], judged, Store(None), "key", Clock(60))
    table = meter.measure([], lambda index, option: 1.0, 1.0)
    at, group = next((at, group) for at, group in enumerate(groups) if group.units)
    assert table.measured == table.wanted == len(group.lefts()) - 1
    assert table.of_amounts(at, group.whole) == 0
    fewest = Option(min(left for left in group.lefts() if left))
    assert table.of_amounts(at, fewest) == table.loss(at, fewest) > 0
    own, other = meter.in_sample(table, judged, samples[:1])[group.kind]
    assert other in table.lefts[at].values()
    assert 0 < own < other


@pytest.mark.parametrize(("own", "count"), [(0.01, 1), (0.08, 0)])
def test_data_that_passes_overfit_are_named(own, count):
    found = list(_too_little({"attention": (0.09, 0.1), "feed-forward": (own, 0.1)}))
    assert len(found) == count
    assert all(sentence.startswith("data= is small: feed-forward with fewer units has the error 0.1 on") for sentence in found)
    assert list(_too_little({})) == []
