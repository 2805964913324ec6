"""Tests of batches by length: rows keep their values, and padding goes."""

from __future__ import annotations

import pytest
import torch

import lissom
from lissom.compiler.training import buckets
from lissom.compiler.training.batches import Batch
from lissom.compiler.training.buckets import by_length
from tests.support import captures
from tests.support.models import FeedForward, normal, seeded, tiny_bert, tiny_gpt2, tokens

LENGTHS = (3, 9, 4, 8, 2, 10, 5, 7)


def program(case):
    return captures.optimize(case.model, case.inputs).program


def padded(lengths=LENGTHS, size=12, pad=1, seed=0):
    """Rows of these lengths: ids and mask, [rows, size]."""
    ids, mask = tokens(len(lengths), size, seed=seed), torch.zeros(len(lengths), size, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, length:] = pad
        mask[row, :length] = 1
    return [ids, mask]


def in_rows(batches):
    """The real tokens of every row and its label, in any order."""
    found = []
    for batch in batches:
        ids, mask = batch.inputs
        for row in range(len(ids)):
            label = [] if batch.labels is None else batch.labels[row].flatten().tolist()
            found.append((ids[row][mask[row] == 1].tolist(), label))
    return sorted(found)


@pytest.mark.parametrize("rows", [None, 3])
def test_rows_of_similar_length_share_a_batch(rows) -> None:
    given = [
        Batch(padded(LENGTHS[at : at + 2], size, seed=at), torch.arange(at, at + 2))
        for at, size in ((0, 12), (2, 8), (4, 10), (6, 9))
    ]
    found = by_length(program(tiny_bert()), given, rows)
    assert in_rows(found.batches) == in_rows(given)
    lengths = [2, 3, 4, 5, 7, 8, 9, 10]
    size = rows or 2
    assert [batch.inputs[0].shape[1] for batch in found.batches] == [max(lengths[at : at + size]) for at in range(0, 8, size)]
    assert found.padding_before == 1 - 48 / 78
    assert found.padding_after < 0.3
    for batch in found.batches:
        assert bool((batch.inputs[0][batch.inputs[1] == 0] == 1).all())


def test_batches_have_few_lengths(monkeypatch) -> None:
    """What adds the fewest tokens is added: one to the row of 2 and one to that of 8."""
    monkeypatch.setattr(buckets, "_LENGTHS", 4)
    given = [Batch(padded((9, 2, 3, 4))), Batch(padded((10, 10, 8, 9), seed=1)), Batch(padded((4, 4), seed=2))]
    found = by_length(program(tiny_bert()), given, 1)
    assert in_rows(found.batches) == in_rows(given)
    assert [batch.inputs[0].shape[1] for batch in found.batches] == [3, 3, 4, 4, 4, 9, 9, 9, 10, 10]


def test_real_tokens_have_the_same_outputs() -> None:
    bert = program(tiny_bert())
    given = [Batch(padded(LENGTHS[:4])), Batch(padded(LENGTHS[4:], seed=1))]
    found = by_length(bert, given, None)

    def hidden(batches):
        with torch.no_grad():
            return torch.cat([bert.run(batch.inputs)[0][batch.inputs[1] == 1] for batch in batches]).sort(0).values

    # Sums over fewer keys round differently.
    assert torch.allclose(hidden(found.batches), hidden(given), atol=1e-6)


def test_labels_of_tokens_are_cut_and_filled_too() -> None:
    given = [
        Batch(inputs := padded(LENGTHS[at : at + 4], size), inputs[0] * inputs[1] - 100 * (1 - inputs[1]))
        for at, size in ((0, 10), (4, 12))
    ]
    found = by_length(program(tiny_gpt2()), given, None)
    for batch in found.batches:
        assert torch.equal(batch.labels, torch.where(batch.inputs[1] == 1, batch.inputs[0], -100))


@pytest.mark.parametrize(
    "why",
    ["no mask", "no padding", "padding on the left", "many values", "labels of numbers", "one batch", "a fixed length"],
)
def test_batches_stay_as_they_are(why) -> None:
    """Where padding is not at the end of rows, or it is not clear with what shorter rows are filled."""
    case, given = tiny_bert(), [Batch(padded()), Batch(padded(seed=1))]
    if why == "no padding":
        given = [Batch(padded((12, 12))), Batch(padded((9, 9), 9))]
    elif why == "padding on the left":
        given = [Batch([item.flip(1) for item in batch.inputs]) for batch in given]
    elif why == "many values":
        given[1] = Batch(padded(pad=3))
    elif why == "labels of numbers":
        given = [Batch(batch.inputs, torch.rand(8, 12)) for batch in given]
    elif why == "one batch":
        given = given[:1]
    if why == "no mask":
        assert (
            by_length(captures.optimize(seeded(FeedForward), normal(4, 5, 8)).program, [Batch([normal(4, 5, 8)])] * 2, None)
            is None
        )
        return
    found = captures.optimize(case.model, case.inputs, dynamic=why != "a fixed length").program
    assert by_length(found, given, None) is None


def test_the_report_says_so() -> None:
    case = tiny_bert()
    found = lissom.optimize(
        case.model,
        case.inputs,
        passes="prune-neurons{keep=0.5},distill{steps=2}",
        data=[tuple(padded(seed=seed)) for seed in range(3)],
    )
    # Batches of 8 rows, 4, 8 and 10 tokens long, hold 144 real tokens.
    (step,) = (step for step in found.report.history.steps if step.curve)
    assert "rows of similar length share a batch: 50% of the tokens were padding, now 18%" in step.notes
    assert " tokens/s; the held-out loss went from " in step.notes[-1] or "gained nothing" in step.notes[-1]
