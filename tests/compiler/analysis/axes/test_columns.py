"""Which columns read which head and which neuron."""

import pytest
import torch
from torch import nn

from lissom.compiler.analysis.axes.axis import Axis, concatenation, product
from lissom.compiler.analysis.axes.columns import Columns, find_head_columns, find_neuron_columns, unit_of
from lissom.compiler.analysis.structure.transformer import structure
from lissom.frontends.capture.export import capture
from tests.compiler.analysis.axes.test_axes import MODELS, canonical
from tests.support.models import Case, normal, seeded
from tests.support.neighbours import all_but_slow

HEADS = [("bert", 1), ("llama", 1), ("t5", 1), ("gpt2", 0), ("bloom", 1), ("deberta", 1)]


@pytest.mark.parametrize(("name", "dim"), all_but_slow(HEADS, *(case for case in HEADS if case[0] not in ("t5", "deberta"))))
def test_heads_are_blocks_of_columns_of_the_output_projection(name: str, dim: int):
    program, _ = canonical(name)
    for site in program.fact(structure).attention:
        found = find_head_columns(program, site)
        assert (found.dim, found.count) == (dim, site.heads)
        width = found.unit.numel() // site.heads
        assert found.unit.tolist() == [index // width for index in range(found.unit.numel())]


@pytest.mark.parametrize("name", all_but_slow(MODELS, *(MODELS.keys() - {"deberta"})))
def test_each_neuron_is_one_column_of_the_down_projection(name: str):
    program, _ = canonical(name)
    for site in program.fact(structure).feed_forward:
        found = find_neuron_columns(program, site)
        assert found.count == site.width
        assert found.unit.tolist() == list(range(site.width))


def test_what_is_zeroed_is_dead():
    program = canonical("llama")[0].copy()
    found = find_head_columns(program, program.fact(structure).attention[0])
    weight = program.weight(str(found.weight.target))
    zeroed = found.zeroed(weight, [1, 3])
    assert found.dead(weight).tolist() == [False] * found.count
    assert found.dead(zeroed).nonzero().flatten().tolist() == [1, 3]
    assert int((zeroed != weight).sum()) == weight.numel() // 2


def test_units_are_numbered_by_the_indices_of_their_axes():
    groups, within, features = Axis(2), Axis(3), Axis(2)
    axis = product([groups, within, features])
    assert unit_of(axis, [groups, within]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert unit_of(axis, [within]).tolist() == [0, 0, 1, 1, 2, 2] * 2
    other = Axis(2)
    assert unit_of(concatenation([product([groups, features]), other]), [groups]).tolist() == [0, 0, 1, 1, -1, -1]


def test_columns_of_a_unit_are_found_wherever_they_lie():
    columns = Columns(None, 0, torch.tensor([0, 1, -1, 0]), None, 2, ())  # pyright: ignore
    assert columns.indices([0]).tolist() == [0, 3]
    weight = torch.ones(4, 2)
    assert columns.zeroed(weight, 0).tolist() == [[0, 0], [1, 1], [1, 1], [0, 0]]
    assert columns.dead(columns.zeroed(weight, 0)).tolist() == [True, False]


class Unprojected(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads)


def test_heads_that_nothing_projects_are_refused():
    case = Case(seeded(Unprojected), (normal(2, 5, 8),))
    program = capture(case.model, case.args).program
    assert find_head_columns(program, program.fact(structure).attention[0]) == "no layer projects its heads out"
