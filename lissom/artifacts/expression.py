"""Sizes as JSON: a number, the name of a symbol, or a function of these as a list, `["Mul", 4, "s27"]`.

Functions are looked up in a table, so that reading a size runs no code named by the file. The size of an expression is checked
before it is built, because sympy evaluates plain numbers at once, and compares the arguments of a maximum in pairs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import sympy
from sympy.core import relational
from torch.utils._sympy import functions

from lissom.errors import ArtifactError
from lissom.io.fields import finite, number, shown

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(sympy.Add, sympy.Mul, sympy.Pow, sympy.And, sympy.Or, sympy.Not),
        *(relational.Equality, relational.Unequality, relational.StrictLessThan, relational.LessThan),
        *(relational.StrictGreaterThan, relational.GreaterThan),
        *(functions.FloorDiv, functions.CleanDiv, functions.CeilDiv, functions.Mod, functions.PythonMod),
        *(functions.ModularIndexing, functions.Max, functions.Min, functions.Where, functions.Identity),
        *(functions.IntTrueDiv, functions.FloatTrueDiv, functions.ToFloat, functions.PowByNatural, functions.FloatPow),
        *(functions.CeilToInt, functions.FloorToInt, functions.TruncToInt, functions.TruncToFloat, functions.RoundToInt),
        functions.OpaqueUnaryFn_sqrt,
    )
}

MOST_PARTS = 512
"""The most numbers, symbols and functions in an expression."""
MOST_BITS = 4096
"""The most bits of an expression's value if symbols have 64 bits: the product of 64 sizes."""
_PARTS_OF_CHOICE = 16
"""A choice counts as so many times its parts: sympy compares with each of its branches, and with those of a choice in it."""
_PRODUCTS = frozenset({"Mul"})
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow"})


def encode_expression(expression: object) -> object:
    """The expression as JSON. Raises ArtifactError for a function an artifact cannot hold."""
    match expression:
        case bool() | int():
            return expression
        case sympy.Symbol():
            return expression.name
        case sympy.Integer():
            return int(expression)
        case sympy.Rational():
            return ["Rational", int(expression.p), int(expression.q)]
        case sympy.Float():
            return ["Float", repr(float(expression))]
        case sympy.Basic() if expression in (sympy.true, sympy.false):
            return bool(expression)
        case sympy.Piecewise() if len(expression.args) == 2 and expression.args[1].args[1] == sympy.true:
            choice, other = expression.args
            return ["Piecewise", *map(encode_expression, (*choice.args, other.args[0]))]
        case sympy.Basic() if FUNCTIONS.get(type(expression).__name__) is type(expression):
            return [type(expression).__name__, *map(encode_expression, expression.args)]
        case _:
            raise ArtifactError(
                f"the program has a size {expression}, which an artifact cannot hold: {type(expression).__name__}"
            )


def decode_expression(data: object, symbols: Mapping[str, sympy.Symbol]) -> sympy.Basic:
    """The expression JSON holds.

    Raises:
        ValueError: for anything `encode_expression` does not write, and for an expression beyond the limits.
    """
    if isinstance(data, list):
        parts, bits = _measure(data)
        if parts > MOST_PARTS:
            raise ValueError(f"the size {shown(data)} has {parts} parts; the limit is {MOST_PARTS}")
        if bits > MOST_BITS:
            raise ValueError(f"the size {shown(data)} may have {shown(bits)} bits; the limit is {MOST_BITS}")
    return _build(data, symbols)


def _build(data: object, symbols: Mapping[str, sympy.Symbol]) -> sympy.Basic:
    match data:
        case bool():
            return sympy.true if data else sympy.false
        case int():
            return sympy.Integer(data)
        case str() if data in symbols:
            return symbols[data]
        case ["Rational", p, q] if q:
            return sympy.Rational(number(p), number(q))
        case ["Float", str() as digits]:
            return sympy.Float(finite(digits))
        case ["Piecewise", x, condition, other]:
            # Without the simplification of conditions, which may take long.
            branches = [(_build(x, symbols), _build(condition, symbols)), (_build(other, symbols), sympy.true)]
            return sympy.Piecewise(*branches, evaluate=False)
        case [str() as name, *arguments] if name in FUNCTIONS:
            return FUNCTIONS[name](*(_build(argument, symbols) for argument in arguments))
        case _:
            raise ValueError(f"{shown(data)} is not a size")


def _measure(data: object) -> tuple[int, int]:
    """The number of parts of an expression, and an upper bound on the bits of its value."""
    match data:
        case int():
            return 1, data.bit_length()
        case ["Float", _]:
            return 1, sys.float_info.max_exp
        case [str() as name, base, exponent] if name in _POWERS:
            parts, bits = _measure(base)
            return parts + 2, bits * max(1, math.ceil(abs(_exponent(exponent))))
        case [str() as name, *arguments]:
            parts, bits = zip((1, 0), *map(_measure, arguments), strict=True)
            # A sum of n terms has at most log2(n) bits more than the largest.
            factor = _PARTS_OF_CHOICE if name == "Piecewise" else 1
            return factor * sum(parts), sum(bits) if name in _PRODUCTS else max(bits) + len(bits).bit_length()
        case _:
            return 1, 64


def _exponent(data: object) -> float:
    match data:
        case int():
            return data
        case ["Rational", int() as p, int() as q] if q:
            return p / q
        case ["Float", str() as digits]:
            return finite(digits)
        case _:
            raise ValueError(f"the exponent {shown(data)} is not a number")
