from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lissom.backends.base import Backend
from lissom.compiler.ir.program import Program
from lissom.ops import fused_rms_norm
from lissom.passes.canonical.raise_rms_norm import RaiseRmsNorm
from tests.support import captures
from tests.support.harness import Calls, TextCase, aten, calls, check_golden, every_backend, rewrite, text_cases
from tests.support.models import normal

Function = Callable[..., torch.Tensor]

PASSES = "remove-no-ops,fold-constants,raise-rms-norm"
EPSILON = 1e-3

SQUARES: dict[str, Function] = {"pow": lambda x: x.pow(2), "square": torch.square, "product": lambda x: x * x}
DIVISIONS: dict[str, Function] = {
    "rsqrt": lambda x, mean: x * torch.rsqrt(mean),
    "one over sqrt": lambda x, mean: x * (1 / torch.sqrt(mean)),
    "power of -0.5": lambda x, mean: mean**-0.5 * x,
    "divided by sqrt": lambda x, mean: x / mean.sqrt(),
    "divided by a power": lambda x, mean: x / mean.pow(0.5),
}
WEIGHTS: dict[str, Function] = {
    "last": lambda x, w: x * w,
    "first": lambda x, w: w * x,
    "absent": lambda x, w: x,
    "gemma": lambda x, w: x * (1.0 + w.float()),
}


def normalised(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON)


def llama(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.w * normalised(x.to(torch.float32)).to(x.dtype)


def llama_reference(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return normalised(x.float()).type_as(x) * model.w


def t5(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return model.w * (x * torch.rsqrt(variance + EPSILON)).to(model.w.dtype)


def gemma(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (normalised(x.float()) * (1.0 + model.w.float())).type_as(x)


HALF: dict[str, Function] = {"llama": llama, "llama reference": llama_reference, "t5": t5, "gemma": gemma}


def weight(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(normal(8, seed=2).to(dtype))


def oracle(x: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
    """Each row by itself, in float64."""
    rows = [row / torch.sqrt(torch.dot(row, row) / len(row) + EPSILON) for row in x.double().reshape(-1, x.shape[-1])]
    found = torch.stack(rows).reshape(x.shape)
    return found if w is None else found * w.double()


def epsilon_of(program: Program) -> object:
    (norm,) = program.nodes(aten.rms_norm.default)
    return norm.args[3]


def test_rewrites() -> None:
    _, history = rewrite("remove-no-ops,raise-rms-norm", Calls(llama, w=weight(torch.bfloat16)), normal(2, 5, 8).bfloat16())
    check_golden("raise_rms_norm", history.diff(1, 2))


def test_leaves_other_graphs_alone() -> None:
    program, history = rewrite(RaiseRmsNorm(), nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8)), normal(2, 5, 8))
    assert program.text() == history.texts[0]
    assert history.steps[1].summary == "nothing to do"


# Every two of them meet, in 20 of 60 spellings.
SPELLINGS = [
    ([*SQUARES][(i + j) % len(SQUARES)], divide, weigh) for i, divide in enumerate(DIVISIONS) for j, weigh in enumerate(WEIGHTS)
]


@pytest.mark.parametrize(("square", "divide", "weigh"), SPELLINGS, ids=", ".join)
def test_numbers(square: str, divide: str, weigh: str) -> None:
    def norm(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        mean = SQUARES[square](x).mean(-1, keepdim=True) + EPSILON
        return WEIGHTS[weigh](DIVISIONS[divide](x, mean), model.w)

    w = weight()
    program, _ = rewrite(PASSES, Calls(norm, w=w), normal(2, 5, 8))
    assert [node.target for node in program.nodes()] == [aten.rms_norm.default]
    factor = {"absent": None, "gemma": 1 + w.double()}.get(weigh, w)
    for shape in ((1, 1, 8), (3, 7, 8)):
        x = normal(*shape, seed=1)
        # A mean of eight, a root and two products round some ten times to 6e-8, on values below 10.
        torch.testing.assert_close(program(x).double(), oracle(x, factor), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", HALF.values(), ids=HALF)
def test_numbers_in_bfloat16(norm: Function) -> None:
    w = weight(torch.bfloat16)
    program, _ = rewrite(PASSES, Calls(norm, w=w), normal(2, 5, 8).bfloat16())
    assert calls(program, aten.rms_norm.default) == 1
    assert calls(program, aten.rsqrt.default, aten.pow.Tensor_Scalar) == 0
    x = normal(3, 7, 8, seed=1).bfloat16()
    wanted = oracle(x, 1 + w.double() if norm is gemma else w)
    # The normalised value and its product with the weight each round to 8 bits: 2 · 2^-8 = 7.8e-3, relative.
    torch.testing.assert_close(program(x).double(), wanted, rtol=8e-3, atol=1e-6)


def test_epsilon_may_be_a_constant_tensor() -> None:
    def norm(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.epsilon)

    program, _ = rewrite(RaiseRmsNorm(), Calls(norm, epsilon=torch.tensor(0.25)), normal(2, 5, 8))
    assert epsilon_of(program) == 0.25


def test_a_width_that_varies_is_read_from_the_input() -> None:
    program, _ = rewrite(RaiseRmsNorm(), Calls(normalised), normal(2, 5))
    x = normal(3, 7, seed=1)
    # As in test_numbers.
    torch.testing.assert_close(program(x).double(), oracle(x), rtol=1e-6, atol=1e-6)


@text_cases("raise_rms_norm")
def test_text_cases(text_case: TextCase) -> None:
    text_case.check()


@every_backend
def test_composes(backend: Backend) -> None:
    w = weight()
    fast = captures.compile(Calls(gemma, w=w), normal(2, 5, 8), backend=backend)
    assert calls(fast.program, aten.rms_norm.default, fused_rms_norm) == 1
    x = normal(3, 7, 8, seed=1)
    # As in test_numbers.
    torch.testing.assert_close(fast(x).double(), oracle(x, 1 + w.double()), rtol=1e-6, atol=1e-6)
