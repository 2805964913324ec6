"""Tests of fuse-rms-norm."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import rms_norm

from lissom.ops import fused_rms_norm
from lissom.passes.lowering.fuse_rms_norm import FuseRmsNorm
from tests.models import normal
from tests.passes.harness import Calls, aten, calls, check_golden, rewrite

FUSED = {
    "weighted": Calls(lambda m, x: rms_norm(x, (8,), m.weight, 1e-6), weight=normal(8)),
    "plain": Calls(lambda x: rms_norm(x, (8,), None, 1e-6)),
    "PyTorch's own eps": Calls(lambda x: rms_norm(x, (8,))),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_norm_is_fused_and_gives_the_same(name: str) -> None:
    program, _ = rewrite(FuseRmsNorm(), FUSED[name], normal(2, 5, 8))
    assert calls(program, fused_rms_norm) == 1
    x = normal(3, 7, 8, seed=1)
    # A sum of eight squares.
    torch.testing.assert_close(program(x), FUSED[name](x), rtol=0, atol=1e-6)


def test_rewrites() -> None:
    _, history = rewrite(FuseRmsNorm(), FUSED["weighted"], normal(2, 5, 8))
    check_golden("fuse_rms_norm", history.diff(0, 1))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: rms_norm(x, (5, 8)), "it norms more than the last dimension"),
        (lambda x: rms_norm(x.double(), (8,)), "there is no kernel for torch.float64 on this machine"),
    ],
)
def test_what_has_no_kernel_is_left_with_the_reason(function, reason: str) -> None:
    program, history = rewrite(FuseRmsNorm(), Calls(function), normal(2, 5, 8), dynamic=False)
    assert calls(program, aten.rms_norm.default) == 1
    assert history.steps[1].skipped[0].reason == reason
