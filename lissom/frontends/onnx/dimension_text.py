"""Symbolic sizes in an ONNX file: a name, or a formula of names and integers such as `past + new`.

Exporters write sums, products, quotients and remainders: `batch*8`, `floor(tokens/2)`, `s0//2 + 1`, `Max(0, past - 4)`. A
formula is parsed here and computed exactly; nothing in the text is evaluated by Python or SymPy. Any other text is a name.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction

LONGEST, LARGEST = 200, 2**40
"""The most characters of a formula, and the largest number in it or value of it."""

_OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: Mapping[str, Callable[..., Fraction | int]] = {
    **dict.fromkeys(("floor", "TruncToInt"), math.floor),
    **dict.fromkeys(("ceiling", "ceil", "CeilToInt"), math.ceil),
    **dict.fromkeys(("Mod", "PythonMod"), operator.mod),
    "Max": max,
    "Min": min,
    "FloorDiv": operator.floordiv,
    "IntTrueDiv": operator.truediv,
}
"""Functions by the names that SymPy, PyTorch and ONNX Runtime write."""
_LARGEST_EXPONENT = 8


class NoFormulaError(ValueError):
    """The text is not a formula, or its value is not a size."""


def names_in(text: str) -> list[str]:
    """The names in a formula, in order. Raises NoFormulaError."""
    nodes = list(ast.walk(_parsed(text)))
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    names = [node for node in nodes if isinstance(node, ast.Name) and node not in called]
    return list(dict.fromkeys(node.id for node in sorted(names, key=lambda node: node.col_offset)))


def size_of(text: str, sizes: Mapping[str, int]) -> int:
    """The value of a formula, given the sizes of its names. Raises NoFormulaError if the text is none, or gives no size."""
    try:
        value = _value(_parsed(text), sizes)
    except (ArithmeticError, TypeError) as error:
        raise NoFormulaError(f"'{text}' has no value: {error}") from error
    if value.denominator != 1 or not 0 < value <= LARGEST:
        raise NoFormulaError(f"'{text}' is {value}, which is not a size")
    return int(value)


def _parsed(text: str) -> ast.expr:
    if len(text) > LONGEST:
        raise NoFormulaError(f"a formula has at most {LONGEST} characters")
    try:
        return ast.parse(text.strip(), mode="eval").body
    # The text is too short for nesting that would crash the parser.
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise NoFormulaError(f"'{text}' is not a formula") from error


def _value(node: ast.expr, sizes: Mapping[str, int]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            value = Fraction(number)
        case ast.Name(id=name) if name in sizes:
            value = Fraction(sizes[name])
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand, sizes)
        case ast.BinOp(op=ast.Pow(), left=left, right=ast.Constant(value=int(exponent))) if 0 <= exponent <= _LARGEST_EXPONENT:
            value = _value(left, sizes) ** exponent
        case ast.BinOp(op=kind, left=left, right=right) if type(kind) in _OPERATORS:
            value = Fraction(_OPERATORS[type(kind)](_value(left, sizes), _value(right, sizes)))
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as args, keywords=[]) if name in _FUNCTIONS:
            value = Fraction(_FUNCTIONS[name](*(_value(arg, sizes) for arg in args)))
        case _:
            raise NoFormulaError(f"'{ast.unparse(node)}' is not part of a formula")
    if max(abs(value), value.denominator) > LARGEST:
        raise NoFormulaError(f"a number in a formula is at most {LARGEST}")
    return value
