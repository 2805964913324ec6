"""Tests of sink-casts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lissom.backends.base import Backend
from lissom.compiler.ir import node as nodes
from tests.support import captures
from tests.support.harness import Calls, aten, calls, check_golden, every_backend, rewrite
from tests.support.models import CASES, normal, seeded

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Function = Callable[[torch.Tensor], object]

WIDENED: dict[str, tuple[Function, object]] = {
    "transpose": (lambda x: x.to(F32).transpose(1, 2).sin(), aten.transpose.int),
    "reshape": (lambda x: x.to(F32).reshape(-1, 4).sin(), aten.reshape.default),
    "slice": (lambda x: x.to(F32)[:, 1:].sin(), aten.slice.Tensor),
    "select": (lambda x: x.to(F32)[:, 0].sin(), aten.select.int),
    "split": (lambda x: [part.sin() for part in x.to(F32).split(4, -1)], aten.split.Tensor),
    "unbind": (lambda x: x.to(F32).unbind(-1)[2].sin(), aten.unbind.int),
    "cat": (lambda x: torch.cat([x[:, 1:].to(F32), x[:, :1].to(F32)], 1).sin(), aten.cat.default),
    "stack": (lambda x: torch.stack([x[:, 0].to(F32), x[:, 1].to(F32)], 1).sin(), aten.stack.default),
}
NARROWED: dict[str, tuple[Function, object]] = {
    "transpose": (lambda x: x.sin().transpose(1, 2).to(BF16).cos(), aten.transpose.int),
    "reshape": (lambda x: x.sin().transpose(1, 2).reshape(-1, 4).to(BF16).cos(), aten.reshape.default),
    "expand": (lambda x: x.sin()[:, None].expand(-1, 3, -1, -1).to(BF16).cos(), aten.expand.default),
    "split": (lambda x: [part.to(BF16).cos() for part in x.sin().split(4, -1)], aten.split.Tensor),
    "cat": (lambda x: torch.cat([x.to(BF16).cos().to(F32), x.sin()], -1).to(BF16).cos(), aten.cat.default),
}
KEPT: dict[str, Function] = {
    "in front of a slice": lambda x: x.sin()[:, 1:].to(BF16).cos(),
    "behind what repeats": lambda x: x[:, :1].to(BF16).cos().to(F32).expand(-1, 3, -1).cos(),
    "read by others too": lambda x: (y := x.to(BF16).cos().to(F32)).transpose(1, 2) @ y,
    "moved values read by others too": lambda x: (y := x.sin().transpose(1, 2)).to(BF16).cos() + y,
    "some pieces": lambda x: [x.sin().split(4, -1)[0].to(BF16).cos(), x.sin().split(4, -1)[1].cos()],
    "parts of two dtypes": lambda x: torch.cat([x.to(BF16).cos().to(F32), x.to(F16).cos().to(F32)], -1).sin(),
    "parts none of which were widened": lambda x: torch.cat([x.sin(), x.cos()], -1).to(BF16).cos(),
}


class Rotated(nn.Module):
    """Splits heads in float32, of values in bfloat16, and turns them back to bfloat16 for the product."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 16).to(BF16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.layer(x).float().chunk(2, -1)
        first = first.unflatten(-1, (2, 4)).transpose(1, 2).to(BF16)
        angles = torch.sigmoid(second).unflatten(-1, (2, 4)).transpose(1, 2).to(BF16)
        return first @ angles.transpose(-1, -2)


def test_rewrites() -> None:
    _, history = rewrite("exact,sink-casts,fold-casts", seeded(Rotated), normal(2, 5, 8).to(BF16))
    last = len(history.steps) - 1
    check_golden("sink_casts", history.diff(last - 2, last - 1))
    assert history.steps[-1].relative_error == 0


@pytest.mark.parametrize("name", WIDENED)
def test_a_cast_that_widens_goes_behind(name: str) -> None:
    function, move = WIDENED[name]
    x = normal(2, 5, 8).to(BF16)
    program, history = rewrite("remove-no-ops,sink-casts", Calls(lambda x: function(x)), x)
    found = [item for node in program.nodes(move) for item in node.all_input_nodes if nodes.is_tensor(item)]
    assert {nodes.tensor_type(item).dtype for item in found} == {BF16}
    assert history.steps[-1].relative_error == 0


@pytest.mark.parametrize("name", NARROWED)
def test_a_cast_that_narrows_goes_in_front(name: str) -> None:
    function, move = NARROWED[name]
    program, history = rewrite("remove-no-ops,sink-casts", Calls(lambda x: function(x)), normal(2, 5, 8))
    found = [item for node in program.nodes(move) for item in node.all_input_nodes if nodes.is_tensor(item)]
    assert {nodes.tensor_type(item).dtype for item in found} == {BF16}
    assert history.steps[-1].relative_error == 0


@pytest.mark.parametrize("name", KEPT)
def test_leaves_other_graphs_alone(name: str) -> None:
    _, history = rewrite("remove-no-ops,sink-casts", Calls(lambda x: KEPT[name](x)), normal(2, 5, 8))
    assert history.texts[-1] == history.texts[-2]


def test_casts_that_meet_cancel() -> None:
    function = lambda x: x.cos().float().transpose(1, 2)[:, :3].unflatten(1, (3, 1)).to(BF16).sin()  # noqa: E731
    program, _ = rewrite("remove-no-ops,sink-casts,fold-casts", Calls(lambda x: function(x)), normal(2, 5, 8).to(BF16))
    assert calls(program, aten.to.dtype, aten._to_copy.default) == 0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.sin()[:, None].expand(-1, 3, -1, -1).contiguous().to(BF16).view(torch.int16).sum(),
         "an operator reads its memory layout"),
        (lambda x: x[:, None].expand(-1, 3, -1, -1).to(BF16), "the caller would be given an input or a weight itself"),
    ],
)  # fmt: skip
def test_reasons(function: Function, reason: str) -> None:
    _, history = rewrite("remove-no-ops,sink-casts", Calls(lambda x: function(x)), normal(2, 5, 8))
    assert [skip.reason for skip in history.steps[-1].skipped] == [reason]


MOVES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x.transpose(0, -1),
    lambda x: x.reshape(x.shape[-1], *x.shape[:-1]),
    lambda x: x[1:],
    lambda x: x.select(0, 0)[None],
    lambda x: torch.cat(x.split(1, 0)[::-1], 0),
    lambda x: torch.cat([part.to(x.dtype) for part in x.to(BF16).split(1, 0)], -1),
    lambda x: x.unsqueeze(0).expand(2, *x.shape).flatten(0, 1),
    lambda x: x.to(BF16),
    lambda x: x.to(F16),
    lambda x: x.to(F32),
    lambda x: x.to(F64),
    lambda x: x.sin(),
]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(MOVES), min_size=2, max_size=7))
def test_any_chain_stays_bit_for_bit(chain: list[Callable[[torch.Tensor], torch.Tensor]]) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        for move in chain:
            x = move(x)
        return x.cos()

    x = normal(3, 4, 5)
    try:
        wanted = function(x)
    except (IndexError, RuntimeError):
        return
    if wanted.numel() == 0:
        return
    program, _ = rewrite("remove-no-ops,fold-casts,sink-casts,fold-casts", Calls(lambda x: function(x)), x, dynamic=False)
    assert torch.equal(program(x), wanted)


@pytest.mark.parametrize("name", ["bert", "llama_eager", "t5", "gpt2"])
def test_models_after_cast_stay_bit_for_bit(name: str) -> None:
    case = CASES[name]()
    optimized = captures.optimize(case.model, case.inputs, passes="mixed-precision")
    errors = {step.spelling: step.relative_error for step in optimized.report.history.steps}
    assert errors["sink-casts"] == errors["fold-casts"] == 0


@every_backend
def test_composes(backend: Backend) -> None:
    case = CASES["llama"]()
    if backend.name == "onnxruntime":
        pytest.skip("ONNX Runtime has no bfloat16 on a CPU; fold-casts is tested there in float16")
    fast = captures.compile(case.model, case.inputs, passes="mixed-precision", backend=backend)
    with torch.no_grad():
        wanted, found = case.model(**case.kwargs).logits, fast(**case.kwargs).logits
    # Two layers, some ten roundings to 8 bits each.
    assert float((wanted - found).abs().max() / wanted.abs().max()) < 5e-2
