"""Counts of token ids in data, without padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lissom.compiler.analysis.structure.real_tokens import real_positions
from lissom.compiler.analysis.token_ids import TokenIds
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.errors import InputError


def count_ids(program: Program, tokens: TokenIds, data: Sequence[Sample]) -> torch.Tensor:
    """How often each id occurs in data, [vocabulary].

    Raises:
        InputError: for an id outside the vocabulary.
    """
    counts = torch.zeros(tokens.size, dtype=torch.int64)
    places = [program.placeholders.index(node) for node in tokens.inputs]
    for number, sample in enumerate(data):
        real = real_positions(program, sample)
        for node, place in zip(tokens.inputs, places, strict=True):
            ids, shape = sample[place], nodes.tensor_type(node).shape
            mask = next((mask for *sizes, mask in real if sizes == [*shape] and mask.shape == ids.shape), None)
            ids = ids.flatten() if mask is None else ids[mask]
            wrong = ids[(ids < 0) | (ids >= tokens.size)]
            if len(wrong):
                raise InputError(
                    f"batch {number} of data= has the token id {int(wrong[0])}, and the vocabulary has 0 to {tokens.size - 1}; "
                    f"give token ids of this model"
                )
            counts += torch.bincount(ids.cpu().long(), minlength=tokens.size)
    return counts
