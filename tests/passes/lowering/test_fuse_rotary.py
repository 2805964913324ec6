"""Tests of fuse-rotary."""

from __future__ import annotations

import pytest
import torch

from lissom.ops import fused_attention, fused_rotary, rotary
from lissom.passes.lowering.fuse_rotary import FuseRotary
from tests.support import captures
from tests.support.harness import Calls, aten, calls, check_golden, rewrite
from tests.support.models import normal, tiny_llama


def turned(interleaved: bool = False):
    return Calls(lambda x, cos, sin: rotary(x, cos, sin, interleaved=interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_is_fused_and_gives_the_same(interleaved: bool) -> None:
    inputs = (normal(2, 3, 5, 8), normal(5, 8, seed=1), normal(5, 8, seed=2))
    program, _ = rewrite(FuseRotary(), turned(interleaved), *inputs, dynamic=False)
    assert calls(program, fused_rotary) == 1
    # Two products and a sum.
    torch.testing.assert_close(program(*inputs), turned(interleaved)(*inputs), rtol=0, atol=1e-6)


def test_rewrites() -> None:
    _, history = rewrite(FuseRotary(), turned(), normal(2, 3, 5, 8), normal(5, 8), normal(5, 8), dynamic=False)
    check_golden("fuse_rotary", history.diff(0, 1))


def test_what_has_no_kernel_is_left_with_the_reason() -> None:
    program, history = rewrite(FuseRotary(), turned(), normal(3, 5, 8), normal(5, 8), normal(5, 8), dynamic=False)
    assert calls(program, rotary) == 1
    assert history.steps[1].skipped[0].reason == "its operand is not [batch, heads, tokens, head_dim]"


def test_llama_runs_few_operators_and_copies_no_key_head() -> None:
    case = tiny_llama()
    program = captures.compile(case.model, case.inputs).program
    layers, config = case.model.config.num_hidden_layers, case.model.config
    assert calls(program, fused_rotary) == 2 * layers
    assert calls(program, aten.expand.default) == 0 or config.num_key_value_heads == config.num_attention_heads
    keys = [node.args[1].meta["val"].shape[1] for node in program.nodes(fused_attention)]
    assert keys == [config.num_key_value_heads] * layers
