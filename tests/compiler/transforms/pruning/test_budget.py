"""Tests of lissom.compiler.transforms.pruning.budget."""

from __future__ import annotations

import pytest
import torch

from lissom.compiler.transforms.pruning.budget import Amount, Choice, Ranking, allocate, check_amount
from lissom.errors import UnsupportedError


def test_the_least_goes_first() -> None:
    found = Ranking.of(torch.tensor([3.0, 1.0, 2.0]))
    assert found.order.tolist() == [1, 2, 0]
    assert found.cost.tolist() == [1.0, 2.0, 3.0]


def test_a_global_amount_is_taken_where_it_costs_least() -> None:
    choices = [Choice("a", 4, False), Choice("b", 4, False)]
    ranked = [Ranking.of(torch.tensor([5.0, 6.0, 7.0, 8.0])), Ranking.of(torch.tensor([4.0, 1.0, 2.0, 9.0]))]
    gone = allocate(Amount(0.5, "global", 1), choices, ranked)
    assert [sorted(item.tolist()) for item in gone] == [[0], [0, 1, 2]]


def test_a_layer_amount_is_taken_from_each() -> None:
    choices = [Choice("a", 4, False), Choice("b", 8, False), Choice("c", 8, True)]
    ranked = [Ranking.of(torch.arange(item.units).float()) for item in choices]
    assert [len(item) for item in allocate(Amount(0.75, "layer", 1), choices, ranked)] == [1, 2, 0]


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("round_to", [2, 3, 4])
@pytest.mark.parametrize("keep", [0.5, 0.7, 0.9])
def test_what_is_left_is_a_multiple(scope: str, round_to: int, keep: float) -> None:
    choices = [Choice("a", 12, False), Choice("b", 11, False), Choice("c", 7, True)]
    generator = torch.Generator().manual_seed(0)
    ranked = [Ranking.of(torch.rand(item.units, generator=generator)) for item in choices]
    gone = allocate(Amount(keep, scope, round_to), choices, ranked)
    left = [item.units - len(one) for item, one in zip(choices, gone, strict=True)]
    assert left[2] == 7
    for item, count in zip(choices[:2], left[:2], strict=True):
        assert count == item.units or (count % round_to == 0 and count > 0)
    total = sum(item.units for item in choices)
    assert sum(left) >= round(keep * total) if scope == "global" else True


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5])
def test_a_share_outside_its_range_is_refused(keep: float) -> None:
    with pytest.raises(UnsupportedError, match="give a fraction above 0 and up to 1"):
        Amount(keep, "global", 1)


@pytest.mark.parametrize(
    ("amount", "sentence"),
    [
        (Amount(0.9, "global", 8), "'first' has 4 heads, which leaves no multiple of round_to=8; give round_to=4 or less"),
        (Amount(0.1, "layer", 1), "keep=0.1 leaves 'first' 0 of its 4 heads, .* give keep=0.25 or more, or protect"),
        (Amount(0.5, "global", 1), "keep=0.5 leaves 4 of 8 heads, but 4 are protected and .* give keep=0.625 or more"),
    ],
)
def test_impossible_amounts_say_where_and_what_is_possible(amount: Amount, sentence: str) -> None:
    with pytest.raises(UnsupportedError, match=sentence):
        check_amount(amount, [Choice("first", 4, False), Choice("second", 4, True)], "heads")


def test_amounts_that_can_be_met_are_not_refused() -> None:
    sites = [Choice("first", 4, False), Choice("second", 4, True)]
    check_amount(Amount(0.625, "global", 1), sites, "heads")
    check_amount(Amount(1.0, "layer", 100), sites, "heads")


def test_an_amount_named_as_possible_is() -> None:
    choices = [Choice("a", 7, False), Choice("b", 6, True)]
    with pytest.raises(UnsupportedError, match=r"give keep=([0-9.]+) or more") as caught:
        check_amount(Amount(0.05, "global", 3), choices, "neurons")
    possible = float(str(caught.value).rpartition("keep=")[2].split()[0])
    check_amount(Amount(possible, "global", 3), choices, "neurons")
