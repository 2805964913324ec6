"""Tests of lissom.compiler.ir.formula: a formula and a program as text, the matches as text."""

from __future__ import annotations

import pytest
from torch import fx

from lissom.artifacts.program_text import parse_program
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.formula import Formula, Match
from lissom.compiler.ir.printer import argument_text

INPUTS = "x: f32[2, 4], y: f32[2, 4], h: bf16[2, 4]"


def editor(body: str) -> Editor:
    """An editor of a program of these lines; types are as for f32[2, 4] where a line names none."""
    lines = [line.strip() for line in body.strip().splitlines()]
    typed = [line if ":" in line.partition("=")[0] else line.replace(" =", ": f32[2, 4] =", 1) for line in lines]
    last = [line.partition(":")[0] for line in typed if line.startswith("%")][-1]
    text = "\n".join(f"  {line}" for line in [*typed, f"return [{last}]"])
    return Editor(parse_program(f"program P({INPUTS}) {{\n{text}\n}}\n"), "test")


def shown(found: Match) -> str:
    values = (f"{name}={argument_text(value)}" for name, value in sorted(found.values.items()))
    return f"%{found.root.name}: {', '.join(values)}"


def matches(formula: Formula, body: str) -> list[str]:
    return [shown(found) for found in editor(body).matches(formula)]


CASES: dict[str, tuple[Formula, str, list[str]]] = {
    "sums and products match in either order": (
        Formula("a * (b + relu(c))"),
        """
        %relu = aten.relu(%x)
        %add = aten.add.Tensor(%relu, %y)
        %mul = aten.mul.Tensor(%add, %x)
        """,
        ["%mul: a=%x, b=%y, c=%x"],
    ),
    "differences and quotients match in one": (
        Formula("relu(a) - b | a / relu(b)"),
        """
        %relu = aten.relu(%x)
        %sub = aten.sub.Tensor(%y, %relu)
        %div = aten.div.Tensor(%relu, %sub)
        %div_1 = aten.div.Tensor(%div, %relu)
        """,
        ["%div_1: a=%div, b=%x"],
    ),
    "several spellings": (
        Formula("a ** 2 | square(a) | a * a"),
        """
        %pow_1 = aten.pow.Tensor_Scalar(%x, 2)
        %square = aten.square(%pow_1)
        %mul = aten.mul.Tensor(%square, %square)
        %mul_1 = aten.mul.Tensor(%mul, %x)
        %pow_2 = aten.pow.Tensor_Scalar(%mul_1, 3)
        """,
        ["%pow_1: a=%x", "%square: a=%pow_1", "%mul: a=%square"],
    ),
    "named parts": (
        Formula("exponential = exp(a)\nexponential / (exponential + b)"),
        """
        %exp = aten.exp(%x)
        %add = aten.add.Tensor(%y, %exp)
        %div = aten.div.Tensor(%exp, %add)
        %exp_1 = aten.exp(%div)
        %div_1 = aten.div.Tensor(%exp_1, %add)
        """,
        ["%div: a=%x, b=%y, exponential=%exp"],
    ),
    "a variable is one value, up to casts, bound where it stands deepest": (
        Formula("a * rsqrt(a)"),
        """
        %to = aten.to.dtype(%h, f32)
        %rsqrt = aten.rsqrt(%to)
        %mul = aten.mul.Tensor(%h, %rsqrt)
        %mul_1 = aten.mul.Tensor(%rsqrt, %x)
        """,
        ["%mul: a=%to"],
    ),
    "casts elsewhere are named": (
        Formula("a * rsqrt(b) | a * (CASTS(rsqrt(b), ...))"),
        """
        %rsqrt: bf16[2, 4] = aten.rsqrt(%h)
        %to = aten.to.dtype(%rsqrt, f32)
        %mul = aten.mul.Tensor(%x, %to)
        %neg = aten.neg(%to)
        %mul_1 = aten.mul.Tensor(%x, %neg)
        """,
        ["%mul: a=%x, b=%h"],
    ),
    "arguments left out have their defaults": (
        Formula("a + b | div(a, b) | gelu(a, ...) | softmax(a, -1)"),
        """
        %add = aten.add.Tensor(%x, %y, alpha=2)
        %div = aten.div.Tensor_mode(%add, %y, rounding_mode='floor')
        %gelu = aten.gelu(%div, approximate='tanh')
        %softmax = aten.softmax.int(%gelu, -1, f32)
        """,
        ["%gelu: a=%div"],
    ),
    "numbers are literals and constants of rank 0": (
        Formula("a * c", c=float),
        """
        weight @factor: f32[]
        weight @row: f32[4]
        weight @count: f32[] state
        %mul = aten.mul.Tensor(%x, 0.5)
        %mul_1 = aten.mul.Tensor(%x, @row)
        %mul_2 = aten.mul.Tensor(%x, @count)
        %mul_3 = aten.mul.Tensor(%x, %y)
        """,
        ["%mul: a=%x, c=0.5"],
    ),
    "dimensions count from the front or from the end": (
        Formula("amax(a, [-1], True) | permute(a, [1, 0]) | sum(a, [dim])", dim=int),
        """
        %amax: f32[2, 1] = aten.amax(%x, [1], True)
        %amax_1: f32[2, 1] = aten.amax(%x, [-1], True)
        %amax_2: f32[1, 4] = aten.amax(%x, [0], True)
        %permute: f32[4, 2] = aten.permute(%x, [-1, -2])
        %sum_1: f32[2] = aten.sum.dim_IntList(%x, [-1])
        """,
        ["%amax: a=%x", "%amax_1: a=%x", "%permute: a=%x", "%sum_1: a=%x, dim=1"],
    ),
    "families and one of several results": (
        Formula("SPLITS(a, sizes, -1)[index]", index=int, sizes=object),
        """
        %chunk: (f32[2, 2], f32[2, 2]) = aten.chunk(%x, 2, 1)
        %getitem: f32[2, 2] = operator.getitem(%chunk, 1)
        %split: (f32[1, 4], f32[1, 4]) = aten.split.Tensor(%x, 1)
        %getitem_1: f32[1, 4] = operator.getitem(%split, 0)
        """,
        ["%getitem: a=%x, index=1, sizes=2"],
    ),
    "any argument, or none": (
        Formula("linear(a, weight, bias)", bias=object),
        """
        weight @bias: f32[4]
        weight @weight: f32[4, 4]
        %linear = aten.linear(%x, @weight)
        %linear_1 = aten.linear(%linear, @weight, @bias)
        """,
        ["%linear: a=%x, bias=None, weight=@weight", "%linear_1: a=%linear, bias=@bias, weight=@weight"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_matches(name: str) -> None:
    formula, body, wanted = CASES[name]
    assert matches(formula, body) == wanted


def test_the_next_way_is_tried_where_the_condition_fails() -> None:
    body = "%mul = aten.mul.Tensor(%x, %y)"
    assert matches(Formula("a * b", lambda found: found["a"].name == "y"), body) == ["%mul: a=%y, b=%x"]
    assert matches(Formula("a * b", lambda found: found["a"].name == "h"), body) == []


def test_a_match_is_private_when_nothing_else_reads_its_calls() -> None:
    formula = Formula("relu(exp(a))")
    body = "%exp = aten.exp(%x)\n%relu = aten.relu(%exp)\n%neg = aten.neg(%relu)"
    assert [found.is_private for found in editor(body).matches(formula)] == [True]
    assert [found.is_private for found in editor(f"{body}\n%neg_1 = aten.neg(%exp)").matches(formula)] == [False]


def test_matches_follow_changes_made_in_between() -> None:
    edit = editor("%neg = aten.neg(%x)\n%neg_1 = aten.neg(%neg)\n%neg_2 = aten.neg(%neg_1)\n%neg_3 = aten.neg(%neg_2)")
    for found in edit.matches(Formula("-(-a)")):
        edit.replace(found.root, found["a"])
    assert "neg_1" not in edit.program.text() and edit.rewritten == 2


def test_values_and_numbers_are_told_apart() -> None:
    (found,) = editor("%mul = aten.mul.Tensor(%x, 3)").matches(Formula("a * c", c=float))
    assert isinstance(found["a"], fx.Node) and found.number("c") == 3
    with pytest.raises(AssertionError, match="'c' is 3"):
        found["c"]
    with pytest.raises(AssertionError, match="'a' is x"):
        found.number("a")


@pytest.mark.parametrize(("text", "part"), [("meen(x)", "meen(x)"), ("x % y", "x % y"), ("ADDS(x)", "ADDS(x)"), ("~x", "~x")])
def test_unknown_operators_are_refused(text: str, part: str) -> None:
    with pytest.raises(ValueError, match="unknown operator") as refused:
        Formula(f"relu({text})")
    assert str(refused.value) == f"the formula calls an unknown operator: '{part}'"


def test_kinds_of_unknown_variables_are_refused() -> None:
    with pytest.raises(ValueError, match="the formula has no variable 'esp'"):
        Formula("x + eps", esp=float)
