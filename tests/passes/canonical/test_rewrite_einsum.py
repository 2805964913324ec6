from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lissom.artifacts.program_text import parse_program
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.verify.divergence import relative_error
from lissom.passes.canonical.rewrite_einsum import RewriteEinsum, parse
from tests.support.harness import Calls, apply, aten, calls, capture_model, check_golden, rewrite
from tests.support.models import normal, seeded

EQUATIONS = {
    "scores": ("bihd,bjhd->bhij", (2, 3, 4, 5), (2, 6, 4, 5)),
    "values": ("bhij,bjhd->bihd", (2, 4, 3, 6), (2, 6, 4, 5)),
    "weight of two dimensions": ("bih,hnd->bind", (2, 3, 4), (4, 5, 6)),
    "back to one dimension": ("bind,hnd->bih", (2, 3, 5, 6), (4, 5, 6)),
    "no batch": ("ij,jk->ki", (3, 4), (4, 5)),
    "outer": ("bi,bj->bij", (2, 3), (2, 4)),
    "dot": ("bi,bi->b", (2, 3), (2, 3)),
    "contracted size of 1": ("bi,ij->bj", (2, 1), (5, 4)),
    "one of two contracted sizes is 1": ("bhd,hdk->bk", (2, 3, 4), (1, 4, 5)),
    "batch of 1": ("bihd,bjhd->bhij", (1, 3, 4, 5), (2, 6, 1, 5)),
}
OTHERS = ["ij->ji", "ij,jk,kl->il", "ii,ij->j", "...i,ij->...j", "ij,kl->il", "ij,jk"]


class Packed(nn.Module):
    """Attention as many papers' code writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.project(x).view(batch, length, 3, 2, 4).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / 2
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(batch, length, 8)


def test_rewrites() -> None:
    _, history = rewrite(RewriteEinsum(), seeded(Packed), normal(2, 5, 8))
    check_golden("rewrite_einsum", history.diff(0, 1))


def test_leaves_other_graphs_alone() -> None:
    program, history = rewrite(RewriteEinsum(), seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU())), normal(2, 5, 8))
    assert program.text() == history.texts[0]
    assert history.steps[1].summary == "nothing to do"


def rewritten(equation: str, x: torch.Tensor, y: torch.Tensor) -> Program:
    """A program of one einsum, rewritten; test_rewrites has one with sizes that vary."""
    shapes = [[*item.shape] for item in (x, y, torch.einsum(equation, x, y))]
    text = (
        f"program Product(x: f32{shapes[0]}, y: f32{shapes[1]}) {{\n"
        f"  %einsum: f32{shapes[2]} = aten.einsum('{equation}', [%x, %y])\n"
        "  return [%einsum]\n}\n"
    )
    return apply(RewriteEinsum(), parse_program(text), [x, y])[0]


@pytest.mark.parametrize("name", EQUATIONS)
def test_numbers(name: str) -> None:
    equation, left, right = EQUATIONS[name]
    x, y = normal(*left), normal(*right, seed=1)
    program = rewritten(equation, x, y)
    assert calls(program, aten.einsum.default) == 0
    terms, _, result = equation.partition("->")
    a, b = terms.split(",")
    letters = [*dict.fromkeys(a + b)]
    shaped = [
        item.double().permute([term.index(letter) for letter in letters if letter in term]).reshape(
            [item.shape[term.index(letter)] if letter in term else 1 for letter in letters]
        )
        for item, term in ((x, a), (y, b))
    ]  # fmt: skip
    kept = [letter for letter in letters if letter in result]
    summed = [index for index, letter in enumerate(letters) if letter not in result]
    product = shaped[0] * shaped[1]
    wanted = (product.sum(summed) if summed else product).permute([kept.index(letter) for letter in result])
    # One float32 matrix product of up to 30 terms against float64.
    assert relative_error(wanted.float(), program.run([x, y])[0]) < 1e-6


def test_several_operands_are_multiplied_from_left_to_right() -> None:
    weights, v, out = normal(2, 3, 5, 5), normal(2, 5, 3, 4, seed=1), nn.Parameter(normal(3, 4, 6, seed=2))
    module = Calls(lambda model, w, v: torch.einsum("bhts,bshd,hdw->btw", w, v, model.out), out=out)
    program, history = rewrite(RewriteEinsum(), module, weights, v)
    assert calls(program, aten.einsum.default) == 0
    assert calls(program, aten.matmul.default) == 2
    assert not history.steps[1].skipped
    wanted = torch.stack([sum(weights[:, h].double() @ v[:, :, h].double() @ out[h].double() for h in range(3))])[0]
    # Two float32 products of up to twelve terms.
    assert relative_error(wanted.float(), program.run([weights, v])[0]) < 1e-6


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 3), st.integers(1, 5))
def test_numbers_of_odd_sizes(batch: int, length: int, heads: int, head_dim: int) -> None:
    q, k = normal(batch, length, heads, head_dim), normal(batch, length + 1, heads, head_dim, seed=1)
    program = rewritten("bihd,bjhd->bhij", q, k)
    assert relative_error(torch.einsum("bihd,bjhd->bhij", q, k), program.run([q, k])[0]) < 1e-6  # float32, few terms


@pytest.mark.parametrize("equation", OTHERS)
def test_equations_that_are_no_product_of_two_operands(equation: str) -> None:
    assert parse(equation) is None


def test_what_is_left_alone_is_reported() -> None:
    module = Calls(lambda x: torch.einsum("bij->bji", x))
    _, history = rewrite(RewriteEinsum(), module, normal(2, 5, 8))
    assert [skip.reason for skip in history.steps[1].skipped] == ["'bij->bji' is no product of two operands"]


def test_two_varying_sizes_in_one_operand_are_left_alone() -> None:
    """`[i·j, b·d]` would need two sizes of -1."""
    function = lambda a, x: torch.einsum("ijh,ijbd->hbd", a, torch.cat([x, x], 2))  # noqa: E731
    x, y = normal(3, 4, 2), normal(3, 4, 5, 6)
    captured = capture_model(Calls(function), x, y, dynamic={"y": {0: "i", 2: "b"}, "x": {0: "i"}})
    program, history = apply("rewrite-einsum", captured.program, captured.example)
    assert calls(program, aten.einsum.default) == 1 and "folds two sizes that vary" in history.steps[-1].skipped[0].reason


def test_size_that_varies_and_is_one_in_example() -> None:
    """Chunks of tokens, as in Mamba-2: PyTorch types the product of one chunk as a product of one in all calls."""
    text = (
        "program Chunked(x: f32[batch, chunks, 8, 4]) {\n"
        "  %einsum: f32[batch, chunks, 8, 8] = aten.einsum('bcld,bcsd->bcls', [%x, %x])\n"
        "  return [%einsum]\n}\n"
    )
    program, history = Pipeline([RewriteEinsum()], checks="structural").run(parse_program(text, {"chunks": 1}))
    assert program.text() == text
    assert "is 1 in the example" in history.steps[-1].skipped[0].reason
    found, _ = Pipeline([RewriteEinsum()], checks="structural").run(parse_program(text, {"chunks": 2}))
    assert calls(found, aten.matmul.default) == 1


def test_composes() -> None:
    program, _ = rewrite("exact", seeded(Packed), normal(2, 5, 8))
    assert calls(program, aten.scaled_dot_product_attention.default) == 1
    assert calls(program, aten.softmax.int) == 0
