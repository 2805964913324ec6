"""Tests of pack-tokens on several ranks: the outputs are the same at every position, padding too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import printed, run_ranks

PACKED = """
from tests.passes.prune.pack_tokens.test_pack_tokens import Encoder, inputs
from tests.support.models import seeded
join()
model = seeded(lambda: Encoder("plain"))
options = {"passes": "zero-padding,pack-tokens", "goal": None, "checks": "off"}
fast = lissom.compile(model, inputs(), backend="distributed", world_size=2, **options)
one = lissom.compile(model, inputs(), **options)
print([step.rewritten > 0 for step in fast.report.history.steps if step.spelling == "pack-tokens"])
generator = torch.Generator().manual_seed(0)
worst, padding = 0.0, True
for batch, length in ((5, 5), (1, 1), (3, 7), (4, 6)):
    x, mask = inputs(batch, length, seed=1)
    # Holes, rows without any token, no padding at all.
    for mask in (mask, torch.rand(batch, length, generator=generator) > 0.5, torch.zeros_like(mask), torch.ones_like(mask)):
        found, wanted = fast(x, mask), one(x, mask)
        worst = max(worst, float((found - wanted).abs().max()))
        padding = padding and not found[~mask].any() and not wanted[~mask].any()
print(worst, padding)
torch.distributed.destroy_process_group()
"""


@pytest.mark.multiprocess
def test_packed_tokens_are_same_on_ranks_at_padding_too(tmp_path: Path) -> None:
    """`zero-padding` makes the outputs there zero, and nothing reads what pack-tokens leaves there."""
    for rewritten, numbers in printed(run_ranks(PACKED, tmp_path, seconds=240)):
        worst, padding = numbers.split()
        # Two layers of sums of eight float32 products of order 1, in another order.
        assert rewritten == "[True]" and float(worst) <= 2e-6 and padding == "True"
