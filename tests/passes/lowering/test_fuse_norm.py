"""Tests of fuse-norm."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm, rms_norm

from lissom.ops import fused_layer_norm, fused_rms_norm
from lissom.passes.lowering.fuse_norm import FuseNorm
from tests.support.harness import Calls, aten, calls, check_golden, rewrite
from tests.support.models import normal

FUSED = {
    "weighted": Calls(lambda m, x: rms_norm(x, (8,), m.weight, 1e-6), weight=normal(8)),
    "plain": Calls(lambda x: rms_norm(x, (8,), None, 1e-6)),
    "PyTorch's own eps": Calls(lambda x: rms_norm(x, (8,))),
    "centred": Calls(lambda m, x: layer_norm(x, (8,), m.weight, m.bias, 1e-6), weight=normal(8), bias=normal(8, seed=1)),
    "centred and weighted": Calls(lambda m, x: layer_norm(x, (8,), m.weight), weight=normal(8)),
    "centred and biased": Calls(lambda m, x: layer_norm(x, (8,), None, m.bias), bias=normal(8)),
    "centred and plain": Calls(lambda x: layer_norm(x, (8,))),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_norm_is_fused_and_gives_the_same(name: str) -> None:
    program, _ = rewrite(FuseNorm(), FUSED[name], normal(2, 5, 8))
    assert calls(program, fused_layer_norm if name.startswith("centred") else fused_rms_norm) == 1
    x = normal(3, 7, 8, seed=1)
    # A sum of eight squares.
    torch.testing.assert_close(program(x), FUSED[name](x), rtol=0, atol=1e-6)


def test_rewrites() -> None:
    _, history = rewrite(FuseNorm(), FUSED["weighted"], normal(2, 5, 8))
    check_golden("fuse_norm", history.diff(0, 1))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: rms_norm(x, (5, 8)), "it norms more than the last dimension"),
        (lambda x: layer_norm(x, (5, 8)), "it norms more than the last dimension"),
        (lambda x: layer_norm(x.bfloat16(), (8,), torch.ones(8)), "its weight or its bias has another dtype"),
        (lambda x: rms_norm(x.double(), (8,)), "there is no kernel for torch.float64 on this machine"),
    ],
)
def test_what_has_no_kernel_is_left_with_the_reason(function, reason: str) -> None:
    program, history = rewrite(FuseNorm(), Calls(function), normal(2, 5, 8), dynamic=False)
    assert calls(program, aten.rms_norm.default, aten.layer_norm.default) == 1
    assert history.steps[1].skipped[0].reason == reason
