"""Tests of lissom.compiler.analysis.cost, with PyTorch's own counter as the oracle."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lissom.compiler.analysis.cost import (
    Cost,
    cost,
    example_sizes,
    flops,
    moves_nothing,
    node_cost,
    node_flops,
    site_costs,
    total_cost,
)
from lissom.compiler.ir import node as nodes
from lissom.errors import UnsupportedError
from lissom.frontends.capture.export import capture
from tests.support.models import CASES, Case, captured, normal, seeded, tokens


def counted(case: Case) -> int:
    """What PyTorch counts; attention as the products it is made of, because its kernel for the CPU goes uncounted there."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        case.model(*case.args, **case.kwargs)
    return counter.get_total_flops()


class Convolutions(nn.Module):
    """A plain, a strided, a grouped and a two-dimensional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv1d(6, 8, 3, padding=1)
        self.strided = nn.Conv1d(8, 4, 5, stride=2)
        self.depthwise = nn.Conv1d(4, 4, 3, groups=4, padding=1)
        self.image = nn.Conv2d(1, 3, (2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.image(self.depthwise(self.strided(self.plain(x))).unsqueeze(1))


class Products(nn.Module):
    """Every spelling of a product of matrices."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.bmm(x, y) + x @ y
        z = torch.baddbmm(z, x, y)
        return z.sum() + torch.addmm(y[0], x[0], y[0]).sum() + torch.mm(x[1], y[1]).sum()


aten = torch.ops.aten


@pytest.mark.parametrize(
    "name", ["feed_forward", "tied", "convolution", "bert", "bert_eager", "llama", "llama_eager", "t5", "gpt2"]
)
def test_operations_are_those_pytorch_counts(name):
    assert flops(captured(name)) == counted(CASES[name]())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 7])
def test_operations_are_counted_at_the_sizes_captured(batch, length):
    case = CASES["bert"]()
    inputs = {"input_ids": tokens(batch, length), "attention_mask": torch.ones(batch, length, dtype=torch.long)}
    program = capture(case.model, (), inputs, dynamic=False).program
    assert flops(program) == counted(Case(case.model, inputs))


@pytest.mark.parametrize(
    "case",
    [
        Case(seeded(Convolutions), (normal(2, 6, 12),)),
        Case(seeded(Products), (normal(2, 4, 4), normal(2, 4, 4))),
    ],
    ids=["convolutions", "products"],
)
def test_operations_of_other_operators_are_those_pytorch_counts(case):
    program = capture(case.model, case.args, dynamic=False).program
    assert flops(program) == counted(case)


def test_linear_layer_costs_two_operations_per_weight_and_row():
    program = captured("feed_forward")
    (linear, _) = program.nodes(torch.ops.aten.linear.default)
    assert node_flops(linear) == 2 * (2 * 5) * (8 * 12)


def test_element_wise_operators_are_free():
    program = captured("feed_forward")
    assert node_flops(program.nodes(torch.ops.aten.gelu.default)[0]) == 0


class Moves(nn.Module):
    """Views, a reshape that has to copy, casts with and without effect, a lookup, an expanded factor, a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 4)

    def forward(self, x, ids):
        turned = x.transpose(0, 1)
        copied = turned.reshape(-1)
        seen = turned.unsqueeze(0)[0, :2]
        half = seen.to(torch.float16)
        wide = torch.ones(1, 3).expand(5, 3)
        rows = self.table(ids)
        return copied, half, x.to(torch.float32) * wide, rows, torch.zeros_like(rows)


def call(program, target):
    (found,) = program.nodes(target)
    return found


def moved(node):
    found = node_cost(node)
    return found.read_bytes, found.written_bytes


@pytest.fixture(scope="module")
def moves():
    return capture(seeded(Moves), (normal(5, 3), torch.tensor([7, 7])), dynamic=False).program


@pytest.mark.parametrize("target", [aten.transpose.int, aten.unsqueeze.default, aten.select.int, aten.expand.default])
def test_views_cost_nothing(moves, target):
    assert node_cost(call(moves, target)) == Cost()


def test_reshape_that_copies_and_cast_that_converts_move_bytes(moves):
    assert not moves_nothing(call(moves, aten.reshape.default))
    assert moved(call(moves, aten.reshape.default)) == (4 * 15, 4 * 15)
    (halved,) = [node for node in moves.nodes(aten.to.dtype) if nodes.tensor_type(node).dtype is torch.float16]
    assert moved(halved) == (4 * 2 * 5, 2 * 2 * 5)


def test_a_cast_to_the_same_type_costs_nothing(moves):
    (same,) = [node for node in moves.nodes(aten.to.dtype) if nodes.tensor_type(node).dtype is torch.float32]
    assert node_cost(same) == Cost()


def test_an_expanded_dimension_is_read_once(moves):
    assert moved(call(moves, aten.mul.Tensor)) == (4 * 15 + 4 * 3, 4 * 15)


def test_lookup_reads_rows_looked_up_and_has_whole_table(moves):
    assert node_cost(call(moves, aten.embedding.default)) == Cost(0, 2 * 8 + 2 * 4 * 4, 2 * 4 * 4, 400)


def test_filling_reads_nothing(moves):
    assert moved(call(moves, aten.zeros_like.default)) == (0, 2 * 4 * 4)


def test_state_write_reads_what_it_writes_only():
    program = captured("counter")
    (write,) = [node for node in program.nodes() if nodes.is_state_write(node)]
    assert moved(write) == (4, 4)


def test_value_read_twice_by_one_node_is_read_once():
    class Square(nn.Module):
        def forward(self, x):
            return x * x

    program = capture(Square(), (normal(2, 3),), dynamic=False).program
    assert moved(call(program, aten.mul.Tensor)) == (4 * 6, 4 * 6)


def test_weight_seen_through_transpose_counts_as_nodes():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return x @ self.weight.t()

    program = capture(seeded(Turned), (normal(2, 4),), dynamic=False).program
    assert node_cost(call(program, aten.matmul.default)) == Cost(2 * 2 * 4 * 8, 4 * (8 + 32), 4 * 16, 32)


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (2, 5), (7, 33)])
def test_a_feed_forward_by_hand(batch, sequence):
    """Norm, up [12, 8], GELU, down [8, 12], sum, in float32."""
    rows = batch * sequence
    found = cost(captured("feed_forward"), {"batch": batch, "sequence": sequence})
    wanted = [
        Cost(0, 4 * (8 * rows + 8 + 8), 4 * 8 * rows, 16),
        Cost(2 * rows * 8 * 12, 4 * (8 * rows + 96 + 12), 4 * 12 * rows, 108),
        Cost(0, 4 * 12 * rows, 4 * 12 * rows, 0),
        Cost(2 * rows * 8 * 12, 4 * (12 * rows + 96 + 8), 4 * 8 * rows, 104),
        Cost(0, 4 * 2 * 8 * rows, 4 * 8 * rows, 0),
    ]
    assert [item for item in found.values() if item != Cost()] == wanted


def test_sizes_stay_symbolic_where_no_number_is_given():
    program = captured("feed_forward")
    name = program.signature.name_of
    (up, _) = program.nodes(aten.linear.default)
    assert name(cost(program)[up].flops) == "192*batch*sequence"
    assert name(cost(program, {"batch": 2})[up].flops) == "384*sequence"
    assert name(cost(program)[up].intensity) == "192*batch*sequence/(80*batch*sequence + 432)"
    assert {program.signature.dimensions[symbol].name for symbol in total_cost(program).symbols} == {"batch", "sequence"}


@pytest.mark.parametrize("name", ["feed_forward", "tied", "convolution", "bert", "llama", "t5", "gpt2"])
def test_symbolic_costs_at_example_match_captured_program(name):
    case = CASES[name]()
    fixed = total_cost(capture(case.model, case.args, case.kwargs, dynamic=False).program)
    program = captured(name)
    found = total_cost(program, example_sizes(program))
    assert found == fixed
    assert (found.flops, found.parameters) == (flops(program), program.parameter_count)
    assert all(isinstance(value, int) for value in (found.flops, found.read_bytes, found.written_bytes))


def test_symbolic_costs_at_other_sizes_match_pytorch():
    case = CASES["llama"]()
    inputs = {"input_ids": tokens(3, 9), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    assert total_cost(captured("llama"), {"batch": 3, "sequence": 9}).flops == counted(Case(case.model, inputs))


def test_sites_add_up_to_the_program():
    program = captured("gpt2")
    sizes = {"batch": 3, "sequence": 7}
    total, sites = total_cost(program, sizes), site_costs(program, sizes)
    for value in ("flops", "read_bytes", "written_bytes", "parameters"):
        assert sum(getattr(item, value) for item in sites.values()) == getattr(total, value)


def test_the_sites_of_a_layer_by_hand():
    """Two layers of width 16 with a feed-forward of 24, two rows of five tokens, every projection with a bias."""
    found = site_costs(captured("bert"), {"batch": 2, "sequence": 5})
    attention = [item for site, item in found.items() if site.kind == "attention"]
    feed_forward = [item for site, item in found.items() if site.kind == "feed-forward"]
    assert [item.flops for item in attention] == [2 * (4 * 10 * 16 * 16 + 2 * 2 * 5 * 5 * 16)] * 2
    assert [item.parameters for item in attention] == [4 * (16 * 16 + 16)] * 2
    assert [item.flops for item in feed_forward] == [2 * 2 * 10 * 16 * 24] * 2
    assert [item.parameters for item in feed_forward] == [2 * 16 * 24 + 24 + 16] * 2
    # up reads 16 and writes 24 values a token, gelu reads and writes 24, down reads 24 and writes 16.
    assert [item.read_bytes for item in feed_forward] == [4 * (10 * (16 + 24 + 24) + 2 * 16 * 24 + 24 + 16)] * 2
    assert [item.written_bytes for item in feed_forward] == [4 * 10 * (24 + 24 + 16)] * 2


def test_tied_weight_counts_once_in_program_and_per_site():
    program = captured("tied")
    assert total_cost(program).parameters == 37 * 8
    assert [item.parameters for site, item in site_costs(program).items() if item.parameters] == [37 * 8, 37 * 8]


def test_value_dependent_size_counts_as_its_maximum():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 8)

        def forward(self, x):
            return self.linear(x[x[:, 0].nonzero().squeeze(1)])

    program = capture(seeded(Chosen), (normal(5, 4),), dynamic=False).program
    (linear,) = program.nodes(aten.linear.default)
    (symbol,) = total_cost(program).symbols
    assert node_cost(linear).flops == 2 * symbol * 4 * 8
    assert flops(program) == 2 * 5 * 4 * 8


def test_intensity_is_operations_a_byte():
    assert Cost(flops=600, read_bytes=100, written_bytes=50).intensity == 4.0
    assert Cost(flops=600).intensity == 0.0


def test_an_unknown_dimension_is_refused():
    message = "FeedForward has no dimension 'sequense'; did you mean 'sequence'? it has batch (1 or more), sequence (1 or more)"
    with pytest.raises(UnsupportedError) as raised:
        cost(captured("feed_forward"), {"sequense": 3})
    assert str(raised.value) == message


def test_dimension_of_program_of_fixed_sizes_is_refused():
    program = capture(seeded(Products), (normal(2, 4, 4), normal(2, 4, 4)), dynamic=False).program
    with pytest.raises(UnsupportedError, match="Products has no dimension 'batch'; all its sizes are fixed"):
        site_costs(program, {"batch": 3})


@pytest.mark.parametrize("size", [0, 33])
def test_a_size_out_of_range_is_refused(size):
    with pytest.raises(UnsupportedError, match=f"sequence = {size} is no size BertModel takes; allowed: 1 to 32"):
        total_cost(captured("bert"), {"sequence": size})


def test_sizes_that_break_a_condition_are_refused():
    program = captured("blocked")
    assert total_cost(program, {"batch": 1, "sequence": 12}).flops == 2 * 12 * 8 * 8
    with pytest.raises(UnsupportedError, match=r"^batch = 1, sequence = 6 breaks a condition of Blocked, .*; give"):
        total_cost(program, {"batch": 1, "sequence": 6})
