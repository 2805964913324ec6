"""Tests of write-state-in-place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lissom
from lissom.compiler.analysis.cost import cost
from lissom.passes.lowering.write_state_in_place import WriteStateInPlace
from tests.support import captures
from tests.support.decoders import decoder
from tests.support.harness import aten, calls, check_golden, rewrite
from tests.support.models import normal

pytestmark = pytest.mark.usefixtures("shared_captures")


class Rows(nn.Module):
    """Keeps rows, and gives the sum of all it has; `what` it does beside decides whether that can be done in place."""

    def __init__(self, what: str = "") -> None:
        super().__init__()
        self.what = what
        self.register_buffer("kept", torch.zeros(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        new = self.kept.index_copy(0, torch.tensor([1, 4]), x)
        before = self.kept.sum() if self.what == "before" else 0.0
        self.kept.copy_(new * 2 if self.what == "changed" else new)
        return new.t() if self.what == "given" else new.sum(0) + before


def test_rewrites() -> None:
    program, history = rewrite(WriteStateInPlace(), Rows(), normal(2, 4), dynamic=False)
    assert calls(program, aten.index_copy_.default) == 1
    assert calls(program, aten.copy_.default, aten.index_copy.default) == 0
    check_golden("write_state_in_place", history.diff(0, 1))


def test_numbers() -> None:
    model = Rows()
    fast = captures.compile(model, normal(2, 4), dynamic=False)
    for seed in range(3):
        # The same sums in the same order.
        assert torch.equal(fast(normal(2, 4, seed=seed)), model(normal(2, 4, seed=seed)))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("before", "'kept' is read beside, and what it was before may be needed"),
        ("given", "the caller is given the state, which the next call would change"),
        ("changed", None),
    ],
)
def test_leaves_other_graphs_alone(what: str, reason: str | None) -> None:
    program, history = rewrite(WriteStateInPlace(), Rows(what), normal(2, 4), dynamic=False)
    assert history.texts[0] == history.texts[1]
    assert calls(program, aten.index_copy_.default) == 0
    assert [skip.reason for skip in history.steps[1].skipped] == ([reason] if reason else [])


def test_token_costs_its_own_rows_and_not_cache() -> None:
    program = lissom.compile_generation(decoder("llama"), max_length=64).program
    writes = program.nodes(aten.index_copy_.default)
    assert len(writes) == len(program.state) == 4
    assert not program.nodes(aten.copy_.default)
    # 2 heads of 8 features in float32.
    assert {cost(program, {"sequence": 1})[write].written_bytes for write in writes} == {64}
