"""Tests of batches: rows joined and split, and the part that is held out."""

from __future__ import annotations

import pytest
import torch

from lissom.compiler.training.batches import hold_out, read_batches
from lissom.errors import RequirementError
from tests import captures
from tests.models import FeedForward, normal, seeded


def program(dynamic: bool = True):
    return captures.optimize(seeded(FeedForward), normal(4, 5, 8), dynamic=dynamic).program


def test_rows_of_equal_shapes_are_joined() -> None:
    data = [[normal(3, 5, 8)], [normal(2, 7, 8)], [normal(4, 5, 8, seed=1)]]
    labels = [torch.arange(3), torch.arange(2), torch.arange(4)]
    found = read_batches(program(), data, labels, 5)
    assert [list(batch.inputs[0].shape) for batch in found] == [[5, 5, 8], [2, 5, 8], [2, 7, 8]]
    assert torch.equal(torch.cat([found[0].inputs[0], found[1].inputs[0]]), torch.cat([data[0][0], data[2][0]]))
    assert [batch.labels.tolist() for batch in found] == [[0, 1, 2, 0, 1], [2, 3], [0, 1]]
    assert [batch.inputs for batch in read_batches(program(), data, [], None)] == data


def test_a_fixed_batch_size_is_refused() -> None:
    with pytest.raises(RequirementError, match="only the batch size of its example inputs, and batch=2 asks for another"):
        read_batches(program(dynamic=False), [[normal(4, 5, 8)]], [], 2)


def test_a_part_is_held_out() -> None:
    batches = read_batches(program(), [[normal(2, 5, 8, seed=seed)] for seed in range(10)], [], None)
    kept, held = hold_out(program(), batches, 0.3, 0, "distill")
    assert len(kept) == 7 and len(held) == 3
    assert {id(item) for item in (*kept, *held)} == {id(item) for item in batches}
    assert [id(item) for item in hold_out(program(), batches, 0.3, 0, "distill")[1]] == [id(item) for item in held]
    assert len(hold_out(program(), batches[:2], 0.9, 0, "distill")[0]) == 1


def test_a_single_batch_is_split_by_rows() -> None:
    (batch,) = read_batches(program(), [[normal(4, 5, 8)]], [torch.arange(4)], None)
    kept, held = hold_out(program(), [batch], 0.25, 0, "distill")
    assert kept[0].labels.tolist() == [0, 1, 2] and held[0].labels.tolist() == [3]
    (row,) = read_batches(program(), [[normal(1, 5, 8)]], [], None)
    with pytest.raises(RequirementError, match="distill has one row of data, and needs at least two"):
        hold_out(program(), [row], 0.1, 0, "distill")
