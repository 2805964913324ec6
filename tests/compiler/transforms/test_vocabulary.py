"""Tests of the removal of token ids: only calls whose operands changed are typed again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lissom
from tests.support.models import seeded


class Sorted(nn.Module):
    """Rows are split by the number of even ids, as the rows of experts are by their number."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.experts = nn.ModuleList([nn.Linear(8, 16), nn.Linear(8, 16)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        even = (ids % 2 == 0).sum()
        parts = x.flatten(0, 1).split(torch.stack([even, ids.numel() - even]).tolist())
        rows = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        gate, up = rows.chunk(2, -1)
        added = torch.zeros_like(x).flatten(0, 1).index_add(0, torch.arange(ids.numel()), nn.functional.silu(gate) * up)
        return self.head(x + added.view(x.shape))


@pytest.mark.parametrize("logits", ["full", "compact"])
def test_sizes_that_depend_on_values_are_not_inferred_again(logits: str) -> None:
    model, ids = seeded(Sorted), torch.arange(8).view(2, 4)
    found = lissom.optimize(model, (ids,), passes=f"prune-vocabulary{{keep=10,logits={logits}}}")
    with torch.no_grad():
        wanted, (actual,) = model(ids), found.program.run([ids])
    assert isinstance(actual, torch.Tensor) and len(found.program.weight("head.weight")) == 10
    assert actual.shape[-1] == (20 if logits == "full" else 10) and bool((actual[..., 10:] == -torch.inf).all())
    # The head sums in another order for another number of rows.
    torch.testing.assert_close(actual[..., :10], wanted[..., :10], rtol=1e-5, atol=1e-6)
