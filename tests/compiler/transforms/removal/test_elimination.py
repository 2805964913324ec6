"""Which dead units can go, and in which order they have to be for it."""

import pytest
import torch

from lissom.compiler.analysis.axes.axis import Axis, product
from lissom.compiler.transforms.removal.elimination import places_of, plan_of


@pytest.mark.parametrize(
    ("dead", "gone", "left"),
    [
        ([[1, 0], [0, 1]], 2, 0),
        ([[1, 1], [0, 0]], 2, 0),
        ([[1, 0], [0, 0]], 0, 1),
        ([[1, 1], [1, 0]], 3, 0),
        ([[0, 0], [0, 0]], 0, 0),
        ([[1, 0, 1, 0], [0, 1, 1, 1]], 4, 1),
        ([[1, 1, 1], [1, 0, 1], [0, 1, 1]], 7, 0),
    ],
)
def test_as_many_go_as_every_group_can_spare(dead: list[list[int]], gone: int, left: int):
    grid = torch.tensor(dead, dtype=torch.bool)
    groups, within = Axis(grid.shape[0]), Axis(grid.shape[1])
    plan = plan_of(None, (groups, within), grid)  # pyright: ignore
    kept = torch.ones_like(grid)
    kept[list(plan.removed.get(groups, ()))] = False
    kept[:, list(plan.removed.get(within, ()))] = False
    moved = grid if plan.order is None else grid.gather(1, plan.order)
    assert int((~kept).sum()) == gone
    assert bool(moved[~kept].all())
    assert len(plan.left) == left
    assert all(bool(grid.flatten()[unit]) for unit in plan.left)


def test_one_unit_is_left_where_all_are_dead():
    axis = Axis(4)
    plan = plan_of(None, (axis,), torch.ones(4, dtype=torch.bool))  # pyright: ignore
    assert plan.removed == {axis: (1, 2, 3)}


def test_an_order_moves_all_features_of_a_unit():
    groups, within, features = Axis(2), Axis(2), Axis(3)
    order = torch.tensor([[1, 0], [0, 1]])
    places = places_of(product([groups, within, features]), groups, within, order)
    assert places.tolist() == [3, 4, 5, 0, 1, 2, 6, 7, 8, 9, 10, 11]
