"""Tests of lissom.compiler.analysis.structure.real_tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from lissom.compiler.analysis.structure.linear import input_of
from lissom.compiler.analysis.structure.real_tokens import token_mask
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.calibration.statistics import moments
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.driver.options import resolve_passes
from lissom.frontends.generation.decoder import capture_decoder
from lissom.generation.decoder import prompts
from lissom.ops import grouped_product
from tests.support import captures
from tests.support.decoders import DECODERS
from tests.support.models import normal, seeded

REAL = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]).bool()
WITH_EMPTY = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()

MASKS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    "keep": (lambda real: real, lambda mask: mask[:, None, None, :]),
    "hide": (lambda real: ~real, lambda mask: ~mask[:, None, None, :]),
    "integers": (torch.Tensor.long, lambda mask: (mask == 1)[:, None, None, :]),
    "additive": (lambda real: torch.zeros(real.shape).masked_fill(~real, -1e4), lambda mask: mask[:, None, None, :]),
    "pairs": (lambda real: (real[:, None] & real[:, :, None])[:, None], lambda mask: mask),
    "causal": (
        lambda real: ~real,
        lambda mask: ~mask[:, None, None, :] & torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril(),
    ),
}
"""By name: the mask of real tokens as a caller gives it, and what a model makes of it for its attention."""


class Attention(nn.Module):
    """One attention with a mask of some kind, and the layer behind it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heads = x[:, None]
        return self.out(functional.scaled_dot_product_attention(heads, heads, heads, MASKS[self.kind][1](mask))[:, 0])


@pytest.mark.parametrize("kind", MASKS)
def test_real_tokens_are_told_by_what_attention_hides(kind: str) -> None:
    make = MASKS[kind][0]
    x = normal(2, 4, 8)
    program = captures.optimize(seeded(lambda: Attention(kind)), (x, make(WITH_EMPTY))).program
    linear = program.nodes(torch.ops.aten.linear.default)[0]
    found = token_mask(program, [x, make(REAL)], linear)
    assert found is not None
    assert torch.equal(found, REAL)
    read = moments(program, [[x, make(REAL)]], [input_of(linear)])[input_of(linear)]
    assert read.count == REAL.sum()


@pytest.mark.parametrize("kind", ["hide", "additive"])
def test_of_a_row_without_a_real_token_all_count(kind: str) -> None:
    make = MASKS[kind][0]
    x = normal(2, 4, 8)
    program = captures.optimize(seeded(lambda: Attention(kind)), (x, make(WITH_EMPTY))).program
    linear = program.nodes(torch.ops.aten.linear.default)[0]
    found = token_mask(program, [x, make(torch.zeros(2, 4, dtype=torch.bool))], linear)
    assert found is not None
    assert bool(found.all())


@pytest.mark.parametrize("observer", ["min-max", "entropy"])
def test_a_mask_that_marks_padding_calibrates_on_the_tokens(observer: str) -> None:
    """Found by tools/fuzz: ranges were those of padding, and without any an error."""
    model = seeded(lambda: Attention("hide"))
    x, real = normal(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    passes = f"quantize{{scheme=int8-static,activations=tensor,observer={observer}}}"
    found = captures.optimize(model, (x, ~real), passes=passes, data=[(x, ~real)]).program
    wanted = model(x, ~real).detach()
    # Ranges of the data itself: an eighth of a bit of 127 each way, over sums of eight.
    assert float((found(x, ~real) - wanted).abs().max() / wanted.abs().max()) < 0.03


def test_additive_mask_counts_zeros_where_no_attention_is_known() -> None:
    class Averaged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + mask[..., None]

    x, mask = normal(2, 4, 8), torch.zeros(2, 4).masked_fill(~REAL, -1e4)
    program = captures.optimize(seeded(Averaged), (x, mask)).program
    found = token_mask(program, [x, mask], program.nodes(torch.ops.aten.linear.default)[0])
    assert found is not None
    assert torch.equal(found, REAL)


def test_slots_of_empty_cache_are_tokens_of_sample() -> None:
    """The padding mask of a decoder is of cache slots, and longer than its texts."""
    program = capture_decoder(seeded(DECODERS["llama"]), max_length=16, batch=2).program
    program, _ = Pipeline(resolve_passes("exact"), checks="off").run(program)
    ids, mask = torch.ones(2, 5, dtype=torch.int64), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    (sample,) = prompts([{"input_ids": ids, "attention_mask": mask}], 2, 16)
    residual = program.fact(structure).residuals[0]
    found = token_mask(program, sample, residual)
    assert found is not None
    assert found.tolist() == [[True] * 5, [False] * 3 + [True] * 2]  # padded on the left


def test_rows_sorted_by_expert_all_count() -> None:
    """With one expert per token there are as many rows as tokens, but in another order."""

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.router = Attention("integers"), nn.Linear(8, 2)
            self.experts = nn.Parameter(normal(2, 8, 8))

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            rows = self.attention(x, mask).flatten(0, 1)
            expert = self.router(rows).argmax(-1)
            ends = torch.stack([(expert <= index).sum() for index in range(2)])
            return grouped_product(rows[expert.argsort()], self.experts, ends)

    x = normal(2, 4, 8)
    program = captures.optimize(seeded(Mixture), (x, REAL.long())).program
    (product,) = program.nodes(grouped_product)
    assert token_mask(program, [x, REAL.long()], product) is token_mask(program, [x, REAL.long()], input_of(product)) is None
    assert token_mask(program, [x, REAL.long()], program.nodes(torch.ops.aten.linear.default)[-1]) is not None
