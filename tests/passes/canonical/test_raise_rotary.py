"""Tests of raise-rotary."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lissom.backends.base import Backend
from lissom.compiler.analysis.axes.axes import axes
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir.program import Program
from lissom.ops import fused_rotary
from tests.support import captures
from tests.support.harness import Calls, TextCase, calls, check_golden, every_backend, rewrite, text_cases
from tests.support.models import normal, seeded, tiny_llama

Function = Callable[..., torch.Tensor]

PASSES = "remove-no-ops,fold-constants,merge-common-subexpressions,raise-rotary"
BATCH, HEADS, TOKENS, WIDTH = 2, 3, 5, 8
rotary = torch.ops.lissom.rotary.default


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_chunks(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def rotate_every_two(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def rotate_unbound(x: torch.Tensor) -> torch.Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), -1).reshape(x.shape)


def halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((cos * a - sin * b, a * sin + b * cos), -1).flatten(-2)


def complex_numbers(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * torch.complex(cos, sin)).flatten(-2).type_as(x)


SPELLINGS: dict[str, tuple[Function, bool, bool]] = {
    # The function, whether its tables have a number a feature, and whether pairs are neighbours.
    "halves swapped": (lambda x, cos, sin: x * cos + rotate_half(x) * sin, True, False),
    "operands turned around": (lambda x, cos, sin: sin * rotate_half(x) + cos * x, True, False),
    "chunks swapped": (lambda x, cos, sin: x * cos + rotate_chunks(x) * sin, True, False),
    "neighbours swapped": (lambda x, cos, sin: x * cos + rotate_every_two(x) * sin, True, True),
    "unbound pairs swapped": (lambda x, cos, sin: x * cos + rotate_unbound(x) * sin, True, True),
    "two halves": (halves, False, False),
    "two neighbours": (neighbours, False, True),
    "complex": (complex_numbers, False, True),
    "a part of the features": (
        lambda x, cos, sin: torch.cat((x[..., :1], x[..., 1:] * cos + rotate_half(x[..., 1:]) * sin), -1), True, False,
    ),
}  # fmt: skip


def tables(whole: bool, interleaved: bool, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, [1, tokens, width] or half as wide, computed in the program as models do."""
    angles = torch.arange(TOKENS)[:, None] * 10.0 ** -(torch.arange(width // 2) / (width // 2))
    if whole:
        angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    return angles.cos()[None], angles.sin()[None]


def oracle(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Each pair as a complex number, in float64."""
    width = x.shape[-1]
    angles = torch.arange(TOKENS)[:, None] * 10.0 ** -(torch.arange(width // 2).double() / (width // 2))
    pairs = x.double().unflatten(-1, (-1, 2)) if interleaved else x.double().unflatten(-1, (2, -1)).mT
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles))
    return turned.flatten(-2) if interleaved else turned.mT.flatten(-2)


def raised(program: Program) -> int:
    return calls(program, rotary)


@pytest.mark.parametrize("name", SPELLINGS)
def test_numbers(name: str) -> None:
    function, whole, interleaved = SPELLINGS[name]
    partial = name == "a part of the features"
    x = normal(BATCH, HEADS, TOKENS, WIDTH + partial)
    cos, sin = tables(whole, interleaved)
    program, _ = rewrite(PASSES, Calls(lambda model, x: function(x, model.cos, model.sin), cos=cos, sin=sin), x)
    assert raised(program) == 1
    found = program.nodes(rotary)[0]
    assert found.kwargs.get("interleaved", False) == interleaved
    wanted = torch.cat([x[..., :1].double(), oracle(x[..., 1:], interleaved)], -1) if partial else oracle(x, interleaved)
    # Two products and a sum in float32, of tables rounded to float32, on values up to 4.
    torch.testing.assert_close(program(x).double(), wanted, rtol=0, atol=2e-6)


def test_halves_times_a_number_are_left_alone() -> None:
    def plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * 2.0 - b * sin, b * 2.0 + a * sin), -1)

    cos, sin = tables(False, False)
    module = Calls(lambda model, x: plain(x, model.cos, model.sin), cos=cos, sin=sin)
    program, history = rewrite("raise-rotary", module, normal(2, 3, TOKENS, WIDTH))
    assert program.text() == history.texts[0]


class Turned(nn.Module):
    """Queries and keys as Llama turns them."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, HEADS * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        angles = torch.arange(x.shape[1])[:, None] * torch.ones(WIDTH // 2)
        angles = torch.cat((angles, angles), -1)
        return q * angles.cos() + rotate_half(q) * angles.sin()


def test_rewrites() -> None:
    _, history = rewrite("remove-no-ops,raise-rotary", seeded(Turned), normal(2, TOKENS, 8))
    check_golden("raise_rotary", history.diff(1, 2))


def test_llama_stays_understood() -> None:
    case = tiny_llama()
    program = captures.optimize(case.model, case.inputs).program
    layers = case.model.config.num_hidden_layers
    assert raised(program) == 2 * layers
    assert [site.positions for site in program.fact(structure).attention] == ["rotary"] * layers
    found = program.fact(axes)
    up = next(node for node in program.nodes(torch.ops.aten.linear.default) if "up_proj" in str(node.args[1]))
    assert found.obstacle(found.axis(up, -1)) is None


@text_cases("raise_rotary")
def test_text_cases(text_case: TextCase) -> None:
    text_case.check()


@every_backend
def test_composes(backend: Backend) -> None:
    module = seeded(Turned)
    fast = captures.compile(module, normal(2, TOKENS, 8), backend=backend)
    assert raised(fast.program) + calls(fast.program, fused_rotary) == 1
    x = normal(3, 7, 8, seed=1)
    # A product of eight terms, then two products and a sum, on values of order 1.
    torch.testing.assert_close(fast(x), module(x), rtol=1e-6, atol=1e-6)
