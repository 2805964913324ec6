"""Tests of cast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lissom
from lissom.compiler import node as nodes
from lissom.compiler.errors import LissomError
from lissom.compiler.program import Program
from lissom.passes.precision.cast import Cast
from tests.models import Case, FeedForward, normal, seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from tests.passes.harness import aten, calls, check_golden, rewrite

MODELS = {build.__name__: build for build in (tiny_bert, tiny_gpt2, tiny_llama, tiny_t5)}


def dtypes_of(program: Program, *targets: object) -> set[torch.dtype]:
    return {nodes.tensor_type(node).dtype for node in program.nodes(*targets)}


def first_output(result: object) -> torch.Tensor:
    values = result.values() if isinstance(result, dict) else result
    return next(item for item in values if isinstance(item, torch.Tensor) and item.is_floating_point())


def test_rewrites() -> None:
    _, history = rewrite(Cast(), seeded(FeedForward), normal(2, 5, 8))
    check_golden("cast", history.diff(0, 1))


@pytest.mark.parametrize("name", MODELS)
def test_products_run_in_bfloat16_and_answers_keep_their_dtype(name: str) -> None:
    case: Case = MODELS[name]()
    fast = lissom.compile(case.model, case.inputs, passes="cast{dtype=bf16}")
    with torch.no_grad():
        wanted, found = first_output(case.model(*case.args, **case.kwargs)), first_output(fast(*case.args, **case.kwargs))
    step = next(step for step in fast.report.history.steps if step.spelling == "cast")
    assert found.dtype == wanted.dtype == torch.float32
    # Two layers, some ten roundings to 8 bits each.
    assert torch.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.999
    assert step.relative_error is not None and 0 < step.relative_error < 0.1
    assert step.size.parameter_bytes < 0.75 * fast.report.history.steps[0].size.parameter_bytes


def test_softmax_and_exponentials_stay_in_float32() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.layer(x), -1) + torch.exp(self.layer(x)) + self.layer(x).pow(2)

    program, _ = rewrite(Cast(), seeded(Mixed), normal(2, 5, 8))
    assert dtypes_of(program, aten.linear.default) == {torch.bfloat16}
    assert dtypes_of(program, aten.softmax.int, aten.exp.default, aten.pow.Tensor_Scalar) == {torch.float32}


def test_positions_are_not_rounded() -> None:
    """bfloat16 has no odd numbers past 256, so angles and masks must be computed before they are cast."""
    case = tiny_llama()
    program = lissom.optimize(case.model, case.inputs, passes="cast").program
    assert dtypes_of(program, aten.cos.default, aten.sin.default) <= {torch.float32}


def test_a_value_is_cast_once_for_all_its_readers() -> None:
    program, _ = rewrite(Cast(), seeded(lambda: Twice()), normal(2, 5, 8))
    assert calls(program, aten.to.dtype) == 2


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) * self.b(x)


def test_the_model_keeps_its_weights() -> None:
    module = seeded(FeedForward)
    before = {name: (weight.data_ptr(), weight.dtype) for name, weight in module.named_parameters()}
    lissom.compile(module, normal(2, 5, 8), passes="cast")
    assert before == {name: (weight.data_ptr(), weight.dtype) for name, weight in module.named_parameters()}


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(LissomError, match=r"cast\{dtype=int3\} is not known; choose bf16"):
        Cast(dtype="int3")
