"""Sizes as JSON: a number, the name of a symbol, or a function of these as a list, `["Mul", 4, "s27"]`.

Functions are found in one table, so that reading a size runs no code the file names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import sympy
from sympy.core import relational
from torch.utils._sympy import functions

from lissom.artifacts.fields import number, shown
from lissom.compiler.errors import ArtifactError

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


def encode_expression(expression: object) -> object:
    """The expression as JSON.

    Raises: ArtifactError for a function an artifact cannot hold.
    """
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
        case sympy.Basic() if FUNCTIONS.get(type(expression).__name__) is type(expression):
            return [type(expression).__name__, *map(encode_expression, expression.args)]
        case _:
            raise ArtifactError(
                f"the program has a size {expression}, which an artifact cannot hold: {type(expression).__name__}"
            )


def decode_expression(data: object, symbols: Mapping[str, sympy.Symbol]) -> sympy.Basic:
    """The expression JSON holds.

    Raises: ValueError for anything `encode_expression` does not write.
    """
    match data:
        case bool():
            return sympy.true if data else sympy.false
        case int():
            return sympy.Integer(data)
        case str() if data in symbols:
            return symbols[data]
        case ["Rational", p, q]:
            return sympy.Rational(number(p), number(q))
        case ["Float", str() as digits]:
            return sympy.Float(float(digits))
        case [str() as name, *arguments] if name in FUNCTIONS:
            return FUNCTIONS[name](*(decode_expression(item, symbols) for item in cast("list[object]", arguments)))
        case _:
            raise ValueError(f"{shown(data)} is no size")
