"""A pruned vocabulary as JSON and back."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import torch

from lissom.compiler.ir.vocabulary import Ids, Logits, Vocabulary
from lissom.io.fields import count, shown, take, take_list, take_optional

_MOST_IDS = 1 << 24


def encode_vocabulary(vocabulary: Vocabulary) -> dict[str, object]:
    """The vocabulary as JSON."""
    fields = {name: getattr(vocabulary, name) for name in ("size", "unknown", "ids", "logits", "tokenizer")}
    return {**fields, "kept": vocabulary.kept.tolist()}


def decode_vocabulary(data: object) -> Vocabulary:
    """The vocabulary from JSON. Raises ValueError for anything `encode_vocabulary` does not write."""
    kept, size = take_list(data, "kept", _index), count(take(data, "size", int))
    if size > _MOST_IDS or not kept or kept[-1] >= size or any(left >= right for left, right in pairwise(kept)):
        raise ValueError(f"a vocabulary of {size} ids keeps {len(kept)} that are not ascending, or not in it")
    unknown = take_optional(data, "unknown", int)
    if unknown is not None and unknown not in {*kept}:
        raise ValueError(f"the unknown token {shown(unknown)} is not among the ids that stay")
    ids, logits = take(data, "ids", str), take(data, "logits", str)
    if ids not in get_args(Ids) or logits not in get_args(Logits):
        raise ValueError(f"a vocabulary has ids {shown(ids)} and logits {shown(logits)}")
    tokenizer = take_optional(data, "tokenizer", str)
    known: dict[str, Ids] = {name: name for name in get_args(Ids)}
    forms: dict[str, Logits] = {name: name for name in get_args(Logits)}
    return Vocabulary(torch.tensor(kept, dtype=torch.int64), size, unknown, known[ids], forms[logits], tokenizer)


def _index(data: object) -> int:
    if not isinstance(data, int) or isinstance(data, bool) or data < 0:
        raise ValueError(f"{shown(data)} is no token id")
    return data
