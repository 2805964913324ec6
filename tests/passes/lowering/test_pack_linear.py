"""Tests of pack-linear."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.errors import InputError
from lissom.ops import packed_embedding, packed_linear
from lissom.ops.packed_linear import unpack
from lissom.passes.lowering.pack_linear import PackLinear
from tests.support import captures
from tests.support.harness import Calls, aten, calls, check_golden, rewrite
from tests.support.models import normal, seeded


class Two(nn.Module):
    """A layer with a bias and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 40), nn.Linear(40, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class Tied(nn.Module):
    """An LM head that is the embedding, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.twice = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self.twice(self.twice(self.table(tokens))), self.table.weight)


def test_rewrites() -> None:
    _, history = rewrite(PackLinear(), seeded(Two), normal(2, 5, 8))
    check_golden("pack_linear", history.diff(0, 1))


def test_numbers() -> None:
    module = seeded(Two)
    program, _ = rewrite(PackLinear(), module, normal(2, 5, 8))
    x = normal(3, 7, 8, seed=1)
    wanted = module.double()(x.double())
    # Sums of up to forty float32 products of order 1.
    torch.testing.assert_close(program(x).double(), wanted, rtol=0, atol=3e-6)


def test_packed_weight_takes_place_of_plain_one() -> None:
    module = seeded(Two)
    program, _ = rewrite(PackLinear(), module, normal(2, 5, 8))
    assert set(program.weights()) == {"up.weight_packed", "up.bias", "down.weight_packed"}
    assert torch.equal(unpack(program.weight("up.weight_packed"), 40), module.up.weight)
    assert program.weight("up.bias").data_ptr() == module.up.bias.data_ptr()


def test_layer_used_twice_is_packed_once_with_its_table() -> None:
    module = seeded(Tied)
    program, _ = rewrite(PackLinear(), module, torch.tensor([[1, 2, 3]]))
    assert calls(program, packed_linear) == 3
    assert len({str(node.args[1]) for node in program.nodes(packed_linear)}) == 2
    assert (calls(program, packed_embedding), calls(program, aten.embedding.default)) == (1, 0)
    ids = torch.tensor([[7, 0, 4, 4], [1, 2, 3, 5]])
    # Two float32 products of a few numbers.
    torch.testing.assert_close(program(ids), module(ids), rtol=0, atol=2e-6)


def test_row_that_is_not_there_is_named_as_before() -> None:
    compiled = captures.compile(seeded(Tied), torch.tensor([[1, 2, 3]]))
    rows = seeded(Tied).table.num_embeddings
    with pytest.raises(InputError, match=f"rows 0 to {rows - 1}"):
        compiled(torch.tensor([[1, rows]]))


def test_a_weight_that_is_read_whole_is_left() -> None:
    weight = nn.Parameter(normal(8, 8))
    module = Calls(lambda self, x: torch.nn.functional.linear(x, self.weight) + self.weight.sum(), weight=weight)
    _, history = rewrite(PackLinear(), module, normal(2, 5, 8))
    assert [skip.reason for skip in history.steps[1].skipped] == ["its weight is read elsewhere too"]


@pytest.mark.parametrize(("dtype", "reason"), [(torch.float64, "no kernel"), (torch.bfloat16, "odd")])
def test_what_has_no_kernel_is_left_with_the_reason(dtype: torch.dtype, reason: str) -> None:
    module = seeded(lambda: nn.Linear(7, 8)).to(dtype)
    program, history = rewrite(PackLinear(), module, normal(2, 5, 7).to(dtype))
    assert calls(program, aten.linear.default) == 1
    assert reason in history.steps[1].skipped[0].reason
