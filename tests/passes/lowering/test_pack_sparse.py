"""Tests of pack-sparse; what needs tensor cores is marked `gpu`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.backends.eager.backend import Eager
from lissom.ops.sparse_linear import sparse_linear
from lissom.passes.lowering.pack_sparse import PackSparse
from tests.ops.test_sparse_linear import two_in_four
from tests.support import captures
from tests.support.harness import aten, calls, check_golden, rewrite
from tests.support.models import normal, seeded


class Two(nn.Module):
    """A layer with a 2:4 weight and a dense one."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128, dtype=dtype), nn.Linear(128, 64, bias=False, dtype=dtype)
        self.up.weight.data.copy_(two_in_four(128, 64, dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def test_rewrites() -> None:
    _, history = rewrite(PackSparse(always=True), seeded(Two), normal(2, 5, 64).bfloat16())
    check_golden("pack_sparse", history.diff(0, 1))
    assert history.steps[1].summary == "rewrote 1"


def test_numbers() -> None:
    module = seeded(Two)
    program, _ = rewrite(PackSparse(always=True), module, normal(2, 5, 64).bfloat16())
    x = normal(3, 7, 64, seed=1).bfloat16()
    assert set(program.weights()) == {"up.weight_values", "up.weight_places", "up.bias", "down.weight"}
    with torch.no_grad():
        torch.testing.assert_close(program(x), module(x))


def test_leaves_other_graphs_alone() -> None:
    """Dense layers are passed over, and a layer whose weight is an embedding's too is left."""
    program, history = rewrite(PackSparse(always=True), seeded(lambda: nn.Linear(64, 64)), normal(2, 5, 64))
    assert (history.texts[0], history.steps[1].summary) == (history.texts[1], "nothing to do")
    assert calls(program, sparse_linear) == 0


@pytest.mark.parametrize(
    ("dtype", "width", "options", "reason"),
    [
        (torch.bfloat16, 64, {}, "its weight is 2:4, which makes it no faster on a CPU"),
        (torch.float32, 64, {"always": True}, "its weight is 2:4, which is fast in bfloat16 and float16 only: put cast before"),
        (torch.bfloat16, 48, {"always": True}, "its weight is 2:4, but its sizes are no multiples of 32 and 64"),
    ],
)
def test_what_cannot_be_packed_is_reported(dtype: torch.dtype, width: int, options: dict[str, bool], reason: str) -> None:
    module = nn.Linear(width, 32, dtype=dtype)
    module.weight.data.copy_(two_in_four(32, width, dtype))
    _, history = rewrite(PackSparse(**options), module, normal(2, 5, width).to(dtype))
    assert history.steps[1].summary == f"rewrote 0 of 1; skipped 1: {reason}"


def test_it_is_of_the_eager_backend_on_cuda() -> None:
    assert "pack-sparse" in [item.name() for item in Eager().lowering(torch.device("cuda"))]
    assert "pack-sparse" not in [item.name() for item in Eager().lowering(torch.device("cpu"))]


def test_composes() -> None:
    module, x = seeded(lambda: Two(torch.float32)), normal(2, 5, 64)
    found = captures.optimize(module, x, passes="sparsify{pattern=2:4},cast{dtype=bf16},pack-sparse{always=true}").program
    assert calls(found, sparse_linear) == 1
    assert calls(found, aten.linear.default) == 1


@pytest.mark.gpu
def test_it_runs_on_tensor_cores() -> None:
    module, x = seeded(Two).cuda(), normal(64, 128, 64).bfloat16().cuda()
    fast = captures.compile(module, x, passes=[PackSparse(always=True)])
    assert calls(fast.program, sparse_linear) == 1
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), module(x), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_by_default_it_is_measured() -> None:
    fast = captures.compile(seeded(Two).cuda(), normal(64, 128, 64).bfloat16().cuda())
    step = next(step for step in fast.report.history.steps if step.spelling == "pack-sparse")
    assert step.rewritten + len(step.skipped) == 1
