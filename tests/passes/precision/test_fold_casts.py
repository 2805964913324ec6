"""Tests of fold-casts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lissom.backends.base import Backend
from lissom.compiler.ir import node as nodes
from tests.support import captures
from tests.support.harness import Calls, aten, calls, check_golden, every_backend, rewrite
from tests.support.models import CASES, normal, seeded
from tests.support.neighbours import all_but_slow

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

UNDONE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "there and back": (lambda x: x.to(F64).to(F32).sin(), 0),
    "there and back, twice": (lambda x: x.to(F64).to(F32).to(F64).to(F32).sin(), 0),
    "over a wider dtype": (lambda x: x.to(F64).to(BF16).sin(), 1),
    "over two wider dtypes": (lambda x: x.to(BF16).to(F32).to(F64).to(F16).sin(), 2),
    "rounded once": (lambda x: x.to(BF16).to(F32).to(BF16).to(F32).sin(), 2),
    "a mask": (lambda x: ((x > 0).to(F32).to(BF16)).sin(), 1),
}
KEPT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one that rounds, and back": lambda x: x.to(BF16).to(F32).sin(),
    "one that rounds to other numbers": lambda x: x.to(BF16).to(F16).sin(),
    "rounded twice": lambda x: x.to(F16).to(BF16).sin(),
    "cut to an integer": lambda x: (x * 9).to(torch.int32).to(F32).sin(),
    "large integers": lambda x: (x * 9).to(torch.int32).to(F32).to(torch.int32).sin(),
}


class Casting(nn.Module):
    """A layer kept in float32 and computed in bfloat16, with casts the way automatic mixed precision puts them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.layer.weight.to(BF16), self.layer.bias.to(BF16)
        y = nn.functional.linear(x.to(BF16), weight, bias)
        y = nn.functional.gelu(y.to(F32).to(BF16))
        return nn.functional.linear(y, weight, bias).to(F32)


def test_rewrites() -> None:
    _, history = rewrite("remove-no-ops,fold-casts", seeded(Casting), normal(2, 5, 8))
    check_golden("fold_casts", history.diff(1, 2))


@pytest.mark.parametrize("name", UNDONE)
def test_casts_that_lose_nothing_are_folded(name: str) -> None:
    function, left = UNDONE[name]
    x = normal(2, 5, 8)
    program, _ = rewrite("remove-no-ops,fold-casts", Calls(lambda x: function(x)), x)
    assert calls(program, aten.to.dtype, aten._to_copy.default) == left
    assert torch.equal(program(x), function(x))


@pytest.mark.parametrize("name", KEPT)
def test_leaves_other_graphs_alone(name: str) -> None:
    x = normal(2, 5, 8)
    program, history = rewrite("remove-no-ops,fold-casts", Calls(lambda x: KEPT[name](x)), x)
    assert history.texts[-1] == history.texts[-2]
    assert torch.equal(program(x), KEPT[name](x))


def test_a_weight_read_cast_is_kept_so() -> None:
    module = seeded(Casting)
    program, history = rewrite("remove-no-ops,fold-casts", module, normal(2, 5, 8))
    kept = program.weights()
    assert {weight.dtype for weight in kept.values()} == {BF16}
    assert all(isinstance(weight, nn.Parameter) for weight in kept.values())
    assert torch.equal(kept["layer.weight_bf16"], module.layer.weight.to(BF16))
    assert module.layer.weight.dtype == F32
    assert history.steps[2].relative_error == 0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda self, x: x @ self.w.to(BF16).to(F32) + self.w.sum(),
            "the weight is read in its own dtype too, and would be held twice",
        ),
        (lambda self, x: x.to(F64) @ self.w.to(F64), "the weight would take more bytes"),
        (lambda self, x: (x, self.w.to(BF16)), "the caller would be given an input or a weight itself"),
        (lambda self, x: x.to(F64).to(F32), "the caller would be given an input or a weight itself"),
    ],
)
def test_reasons(function: Callable[..., object], reason: str) -> None:
    module = Calls(function, w=nn.Parameter(normal(8, 8)))
    _, history = rewrite("remove-no-ops,fold-casts", module, normal(2, 8))
    assert [skip.reason for skip in history.steps[2].skipped] == [reason]


class Snapshot(nn.Module):
    """Returns what its state was before it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.seen.to(F64).to(F32)
        self.seen.add_(x.sum(0))
        return before + x


def test_state_is_read_before_it_is_written() -> None:
    program, history = rewrite("remove-no-ops,fold-casts", Snapshot(), normal(3, 4))
    assert {skip.reason for skip in history.steps[2].skipped} == {"it keeps the value of the state before a write"}
    x = normal(3, 4)
    assert torch.equal(program(x), x)


@pytest.mark.parametrize("name", all_but_slow(["bert", "llama", "t5", "gpt2"], "bert", "llama", "gpt2"))
def test_models_kept_in_bfloat16_stay_bit_for_bit(name: str) -> None:
    case = CASES[name]()
    model = case.model.to(BF16)
    optimized = captures.optimize(model, case.inputs, passes="exact,fold-casts,sink-casts,fold-casts")
    errors = {step.spelling: step.relative_error for step in optimized.report.history.steps if "casts" in step.spelling}
    assert set(errors.values()) == {0}
    casts = [node for node in optimized.program.nodes(aten.to.dtype) if node.args[0].op == "get_attr"]  # pyright: ignore
    assert all(nodes.tensor_type(node).dtype.itemsize > 2 for node in casts)


@every_backend
def test_composes(backend: Backend) -> None:
    case = CASES["llama"]()
    passes = "cast{dtype=fp16},sink-casts,fold-casts"
    fast = captures.compile(case.model, case.inputs, passes=passes, backend=backend, data=[case.inputs])
    with torch.no_grad():
        wanted, found = case.model(**case.kwargs).logits, fast(**case.kwargs).logits
    # Two layers, some ten roundings to 11 bits each.
    assert float((wanted - found).abs().max() / wanted.abs().max()) < 5e-3
