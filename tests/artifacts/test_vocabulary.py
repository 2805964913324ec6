"""Tests of pruned vocabularies in artifacts: the same after reading, and refused in any other form."""

from __future__ import annotations

import json

import pytest
import torch

from lissom.artifacts.vocabulary import decode_vocabulary, encode_vocabulary
from lissom.compiler.ir.vocabulary import Vocabulary

PRUNED = Vocabulary(torch.tensor([0, 3, 4]), 9, 3, "tokenizer", "compact", "{}")


def test_the_same_after_reading() -> None:
    read = decode_vocabulary(json.loads(json.dumps(encode_vocabulary(PRUNED))))
    assert torch.equal(read.kept, PRUNED.kept)
    fields = [(each.size, each.unknown, each.ids, each.logits, each.tokenizer) for each in (read, PRUNED)]
    assert fields[0] == fields[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": [0, 4, 3]}, "a vocabulary of 9 ids keeps 3 that are not ascending, or not in it"),
        ({"kept": []}, "a vocabulary of 9 ids keeps 0"),
        ({"kept": [0, 3, 9]}, "a vocabulary of 9 ids keeps 3"),
        ({"kept": [0, 3, True]}, "True is no token id"),
        ({"kept": [-1, 3]}, "-1 is no token id"),
        ({"size": 1 << 40}, "a vocabulary of 1099511627776 ids"),
        ({"unknown": 1}, "the unknown token 1 is not among the ids that stay"),
        ({"ids": "other"}, "a vocabulary has ids 'other' and logits 'compact'"),
        ({"tokenizer": 3}, "tokenizer"),
    ],
)
def test_other_forms(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_vocabulary(encode_vocabulary(PRUNED) | change)


def test_new_ids() -> None:
    assert PRUNED.new_ids.tolist() == [0, -1, -1, 1, 2, -1, -1, -1, -1]
    assert PRUNED.renumbered(torch.tensor([[4, 8], [0, 3]])).tolist() == [[2, 1], [0, 1]]
    assert PRUNED.readable(torch.tensor([8, 4])).tolist() == [3, 4]
    without = Vocabulary(torch.tensor([2, 5]), 6)
    assert without.renumbered(torch.tensor([5, 1])).tolist() == [1, 0]
    assert without.dropped.tolist() == [True, True, False, True, True, False]
