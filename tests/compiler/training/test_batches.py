"""Tests of batches: rows joined and split, and the part that is held out."""

from __future__ import annotations

import pytest
import torch

from lissom.compiler.training.batches import MOST_HELD_OUT, MOST_NEXT_TOKENS, Batch, amount, hold_out, resized
from lissom.errors import RequirementError
from tests.support import captures
from tests.support.models import FeedForward, normal, seeded, tiny_bert, tokens


def program(dynamic: bool = True):
    return captures.optimize(seeded(FeedForward), normal(4, 5, 8), dynamic=dynamic).program


def test_rows_of_equal_shapes_are_joined() -> None:
    data = [[normal(3, 5, 8)], [normal(2, 7, 8)], [normal(4, 5, 8, seed=1)]]
    found = resized(program(), [Batch(inputs, torch.arange(len(inputs[0]))) for inputs in data], 5)
    assert [list(batch.inputs[0].shape) for batch in found] == [[5, 5, 8], [2, 5, 8], [2, 7, 8]]
    assert torch.equal(torch.cat([found[0].inputs[0], found[1].inputs[0]]), torch.cat([data[0][0], data[2][0]]))
    assert [batch.labels.tolist() for batch in found] == [[0, 1, 2, 0, 1], [2, 3], [0, 1]]


def test_a_fixed_batch_size_is_refused() -> None:
    with pytest.raises(RequirementError, match="only the batch size of its example inputs, and batch=2 asks for another"):
        resized(program(dynamic=False), [Batch([normal(4, 5, 8)])], 2)


def test_a_part_is_held_out() -> None:
    batches = [Batch([normal(2, 5, 8, seed=seed)]) for seed in range(10)]
    kept, held = hold_out(program(), batches, 0.3, 0, "distill")
    assert len(kept) == 7 and len(held) == 3
    assert {id(item) for item in (*kept, *held)} == {id(item) for item in batches}
    assert [id(item) for item in hold_out(program(), batches, 0.3, 0, "distill")[1]] == [id(item) for item in held]
    assert len(hold_out(program(), batches[:2], 0.9, 0, "distill")[0]) == 1


def test_of_much_data_few_batches_are_held_out() -> None:
    batches = [Batch([torch.zeros(1, 5, 8)]) for _ in range(20 * MOST_HELD_OUT)]
    kept, held = hold_out(program(), batches, 0.1, 0, "distill")
    assert len(held) == MOST_HELD_OUT and len(kept) == 19 * MOST_HELD_OUT


def test_next_tokens_are_held_out_by_their_number() -> None:
    bert = tiny_bert()
    found = captures.optimize(bert.model, bert.inputs).program
    batches = [Batch([tokens(4, MOST_NEXT_TOKENS // 32), torch.ones(4, MOST_NEXT_TOKENS // 32).long()]) for _ in range(100)]
    assert len(hold_out(found, batches, 0.1, 0, "distill")[1]) == 10
    assert len(hold_out(found, batches, 0.1, 0, "distill", next_tokens=True)[1]) == 8
    assert len(hold_out(found, [batches[0]] * 100, 0.05, 0, "distill", next_tokens=True)[1]) == 5


def test_a_single_batch_is_split_by_rows() -> None:
    kept, held = hold_out(program(), [Batch([normal(4, 5, 8)], torch.arange(4))], 0.25, 0, "distill")
    assert kept[0].labels.tolist() == [0, 1, 2] and held[0].labels.tolist() == [3]
    kept, held = hold_out(program(), [Batch([normal(2, 5, 8)])], 0.8, 0, "distill")
    assert len(kept[0].inputs[0]) == len(held[0].inputs[0]) == 1
    with pytest.raises(RequirementError, match="distill has one row of data, and needs at least two"):
        hold_out(program(), [Batch([normal(1, 5, 8)])], 0.1, 0, "distill")


def test_amount_of_batch_is_counted_in_tokens_or_rows() -> None:
    assert amount(program(), [Batch([normal(4, 5, 8)]), Batch([normal(2, 5, 8)])]) == (3.0, "rows")
    bert = tiny_bert()
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    found = captures.optimize(bert.model, bert.inputs).program
    assert amount(found, [Batch([tokens(2, 6), mask])]) == (10.0, "tokens")
