"""Tests of the integer program and of the corrections, against brute force and known laws."""

from __future__ import annotations

import itertools
import math
import random
import sys

import pytest

import lissom
from lissom.errors import UnsupportedError
from lissom.tuning.corrections import Factors, PowerLaw, Ratios, fit_parts
from lissom.tuning.sites import Option
from lissom.tuning.solve import Item, solve
from tests.support.models import feed_forward


def table(seed: int, groups: int = 4):
    numbers = random.Random(seed)
    return [
        [Item(Option(4), 0.0, 0.0)]
        + [Item(Option(left), numbers.random(), -numbers.random() * (4 - left)) for left in (3, 2, 1, 0)]
        for _ in range(groups)
    ]


def best(found, least, bounded, bound):
    """The least of one figure by trying every choice; one group keeps some units."""
    return min(
        sum(getattr(item, least) for item in choice)
        for choice in itertools.product(*found)
        if sum(getattr(item, bounded) for item in choice) <= bound + 1e-9 and any(item.option.left for item in choice)
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_solution_is_the_best_of_all(seed):
    found, parts = table(seed), ["attention"] * 4
    for bound in (0.0, 0.5, 1.5, 9.0):
        choice = solve(found, parts, loss=bound)
        assert sum(item.loss for item in choice) <= bound + 1e-6
        assert sum(item.cost for item in choice) == pytest.approx(best(found, "cost", "loss", bound))
    for bound in (0.0, -2.0, -5.0):
        choice = solve(found, parts, cost=bound)
        assert sum(item.cost for item in choice) <= bound + 1e-6
        assert sum(item.loss for item in choice) == pytest.approx(best(found, "loss", "cost", bound))


def test_a_bound_that_no_choice_meets_has_no_solution():
    assert solve(table(0), ["attention"] * 4, cost=-1000.0) is None


def test_a_program_without_groups_has_one_choice():
    assert solve([], [], loss=0.1) == []
    assert solve([], [], cost=-1.0) is None


def test_one_group_of_a_kind_stays():
    items = [Item(Option(4), 0.0, 0.0), Item(Option(0), 0.0, -1.0)]
    choice = solve([items, items, items], ["attention", "attention", "feed-forward"], loss=1.0)
    assert [item.option.left for item in choice].count(0) == 1


def test_options_without_a_known_loss_are_not_taken():
    items = [Item(Option(4), 0.0, 0.0), Item(Option(2), math.inf, -1.0)]
    assert [item.option.left for item in solve([items, items], ["attention"] * 2, loss=math.inf)] == [4, 4]


def test_a_power_law_is_recovered():
    law = PowerLaw().fit([(x, 3 * x**0.7) for x in (0.01, 0.1, 0.5, 2.0)], near=1.0)
    assert (law.scale, law.exponent) == pytest.approx((3.0, 0.7))
    assert law.inverse(law(0.3)) == pytest.approx(0.3)
    assert PowerLaw(1.0, 0.5).fit([(4.0, 6.0)], near=1.0)(4.0) == pytest.approx(6.0)
    assert PowerLaw(1.0, 0.5).fit([], near=1.0) == PowerLaw(1.0, 0.5)


def test_costs_are_corrected_by_programs_that_are_alike():
    """A ratio carries over by the weight of what two programs share, here 3 of 4 for the features "a" and "b"."""
    ratios = Ratios([(("a", "b"), 10.0, 12.0)], [3.0, 1.0])
    assert ratios(("a", "b")) == pytest.approx(1.2, rel=0.01)
    assert math.log(ratios(("a", "c"))) == pytest.approx(0.75 * math.log(ratios(("a", "b"))))
    assert ratios(("c", "d")) == pytest.approx(1.0)
    assert Ratios()(("a", "b")) == 1.0


def test_more_similar_of_two_measured_programs_counts():
    points = [(("a", "a", "a", "a"), 10.0, 8.0), (("b", "b", "b", "a"), 10.0, 12.0)]
    ratios = Ratios(points, [1.0] * 4)
    assert ratios(("a", "a", "a", "c")) < 0.9 < 1.1 < ratios(("b", "b", "b", "c"))


def test_cost_to_reach_is_that_of_nearest_measured_program():
    ratios = Ratios([(("a",), 10.0, 8.0), (("b",), 10.0, 12.0)], [1.0])
    assert ratios.inverse(11.0) == pytest.approx(11.0 * 10 / 12)
    assert Ratios().inverse(7.0) == 7.0


def test_a_missing_scipy_is_named_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    case = feed_forward()
    with pytest.raises(UnsupportedError, match=r"scipy: pip install 'lissom\[tune\]'"):
        lissom.tune(case.model, case.inputs, data=[case.inputs])


@pytest.mark.parametrize("part", [0, 1])
def test_factor_on_one_part_is_found_from_points(part):
    generator = random.Random(3)
    drawn = [[10 ** generator.uniform(-4, -1) for _ in range(3)] for _ in range(12)]
    true = Factors(*(0.25 if at == part else 1.0 for at in range(2)))
    parts = [(sum(three), *three[1:]) for three in drawn]
    points = [(*three, true(*three) ** 0.5) for three in parts]
    factors, law = fit_parts(PowerLaw(1.0, 0.5), points, 0.1)
    assert factors[part] < 0.5 < factors[1 - part]
    assert [law(factors(*three)) for three in parts] == pytest.approx([y for *_, y in points], rel=0.1)
    # Few points do not set it.
    assert fit_parts(PowerLaw(1.0, 0.5), points[:3], 0.1, Factors(0.4))[0] == Factors(0.4)


def test_factors_are_1_without_points_or_parts():
    assert fit_parts(PowerLaw(), [], 0.1)[0] == Factors()
    points = [(x, 0.0, 0.0, 2 * x) for x in (0.1, 0.2, 0.3, 0.5)]
    assert fit_parts(PowerLaw(), points, 0.1)[0] == Factors()


def test_weighted_item_has_factors_on_parts_of_its_loss():
    item = Item(Option(4), 0.5, -1.0, 0.2, 0.1)
    assert item.weighted(Factors(0.5, 3.0)).loss == pytest.approx(0.6)
    assert item.weighted(Factors()) == item


def test_four_bit_lm_head_with_excess_loss_is_dropped():
    """The measured losses of Gemma 3 270M: uniform schemes, and a mixture with an LM head in int4 that lost a tenth more."""
    points = [
        (0.00154, 0.0, 0.00057, 0.0047),
        (0.00491, 0.0, 0.00077, 0.0176),
        (0.00506, 0.0, 0.00077, 0.0219),
        (0.00169, 0.0, 0.00057, 0.0055),
        (0.00499, 0.0, 0.00195, 0.0215),
        (0.00486, 0.0, 0.00195, 0.0221),
    ]
    mixture = 0.00474, 0.0, 0.00195
    one, without = fit_parts(PowerLaw(), [(loss, 0.0, 0.0, y) for loss, _, _, y in points], 0.02)
    factors, law = fit_parts(PowerLaw(), points, 0.02)
    assert one == Factors() and factors.tables > 1
    assert without(mixture[0]) < 0.0201 < law(factors(*mixture))  # 0.0220 was measured


def test_a_bound_without_end_allows_every_loss():
    law = PowerLaw().fit([(1.0, 1e-3), (2.0, 3e-3), (4.0, 9e-3)], 1e-3)
    assert law.inverse(1e300) > 1e100
    assert PowerLaw(1.0, 0.25).inverse(1e300) == math.inf
