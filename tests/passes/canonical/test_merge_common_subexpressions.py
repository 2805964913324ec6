from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lissom.backends.base import Backend
from lissom.passes.canonical.merge_common_subexpressions import MergeCommonSubexpressions
from tests.support import captures
from tests.support.harness import (
    Calls,
    TextCase,
    apply,
    aten,
    calls,
    check_golden,
    every_backend,
    rewrite,
    text_cases,
)
from tests.support.models import captured, normal, seeded

Function = Callable[..., object]


class Repeats(nn.Module):
    """Two layers that each build the same mask from the same input."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            bias = (1 - mask[:, None].to(x.dtype)) * -1e9
            x = (x + bias.transpose(1, 2)).softmax(-1)
        return x


def test_rewrites() -> None:
    _, history = rewrite(MergeCommonSubexpressions(), Repeats(), normal(2, 5, 8), torch.ones(2, 5, dtype=torch.long))
    check_golden("merge_common_subexpressions", history.diff(0, 1))


def test_leaves_other_graphs_alone() -> None:
    module = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))
    program, history = rewrite(MergeCommonSubexpressions(), module, normal(2, 5, 8))
    assert program.text() == history.texts[0]
    assert history.steps[1].summary == "nothing to do"


@pytest.mark.parametrize("batch, length", [(2, 5), (1, 1), (3, 11)])
def test_numbers(batch: int, length: int) -> None:
    module = Repeats()
    program, _ = rewrite(MergeCommonSubexpressions(), module, normal(2, 5, 8), torch.ones(2, 5, dtype=torch.long))
    x, mask = normal(batch, length, 8, seed=1), torch.ones(batch, length, dtype=torch.long)
    mask[-1, -1] = 0
    # The same kernels on the same values: equal to the last bit.
    assert torch.equal(program(x, mask), module(x, mask))


def test_equal_constants_of_rank_0_are_one() -> None:
    def twice(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (x == model.a) & (x == model.b) & (x == model.c) & (x == model.d)

    parts = {"a": torch.tensor(2.0), "b": torch.tensor(2.0), "c": torch.tensor(2), "d": nn.Parameter(torch.tensor(2.0))}
    program, _ = rewrite(MergeCommonSubexpressions(), Calls(twice, **parts), normal(2, 5))
    # The whole number is of another type, and a parameter may be trained.
    assert sorted(program.weights()) == ["a", "c", "d"]


def test_random_numbers_stay_apart() -> None:
    # Times zero, so that two runs agree.
    module = Calls(lambda x: x + torch.rand_like(x) * 0 + torch.rand_like(x) * 0)
    program, _ = rewrite(MergeCommonSubexpressions(), module, normal(2, 5, 8))
    assert calls(program, aten.rand_like.default) == 2


def test_state_is_written_as_often_as_before() -> None:
    program, _ = apply(MergeCommonSubexpressions(), captured("counter"), [normal(3, 4)])
    assert calls(program, aten.copy_.default) == 1
    x = normal(3, 4)
    # The second call has counted three rows more; adding 3 twice rounds once more than adding 6, to 6e-8 of at most 10.
    torch.testing.assert_close(program(x) + 3, program(x), rtol=0, atol=2e-6)


@text_cases("merge_common_subexpressions")
def test_text_cases(text_case: TextCase) -> None:
    text_case.check()


@every_backend
def test_composes(backend: Backend) -> None:
    module = Repeats()
    inputs = (normal(2, 5, 8), torch.ones(2, 5, dtype=torch.long))
    fast = captures.compile(module, inputs, passes=[MergeCommonSubexpressions(), MergeCommonSubexpressions()], backend=backend)
    x, mask = normal(3, 7, 8, seed=1), torch.ones(3, 7, dtype=torch.long)
    # Each backend sums products in its own order.
    torch.testing.assert_close(fast(x, mask), module(x, mask), rtol=0, atol=2e-6)
    merges = [step for step in fast.report.history.steps if step.spelling == "merge-common-subexpressions"]
    assert merges[-1].summary == "nothing to do"
