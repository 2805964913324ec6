"""The text of a size, `2*sequence - 1`, as the data that `decode_expression` reads; no code in it is run."""

from __future__ import annotations

import ast

from lissom.artifacts.expression import FUNCTIONS

MOST_CHARACTERS = 2000
_COMPARISONS = {
    ast.Eq: "Equality",
    ast.NotEq: "Unequality",
    ast.Lt: "StrictLessThan",
    ast.LtE: "LessThan",
    ast.Gt: "StrictGreaterThan",
    ast.GtE: "GreaterThan",
}
_OPERATORS = {
    ast.Add: "Add",
    ast.Mult: "Mul",
    ast.Pow: "Pow",
    ast.FloorDiv: "FloorDiv",
    ast.Mod: "Mod",
    ast.BitAnd: "And",
    ast.BitOr: "Or",
}
_SHORT = {"Eq": "Equality", "Ne": "Unequality"}


def expression_data(text: str) -> tuple[object, set[str]]:
    """The expression as data, and the names in it.

    Raises: ValueError for anything but numbers, names, arithmetic, comparisons and the functions of sizes.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"a size has {len(text)} characters; the limit is {MOST_CHARACTERS}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"'{text:.80}' is not a size") from None
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    functions = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return _data(tree), names - functions


def _data(tree: ast.expr) -> object:
    match tree:
        case ast.Constant(value=bool() | int()):
            return tree.value
        case ast.Constant(value=float()):
            return ["Float", repr(tree.value)]
        case ast.Name():
            return tree.id
        case ast.UnaryOp(op=ast.USub()):
            return ["Mul", -1, _data(tree.operand)]
        case ast.UnaryOp(op=ast.Invert()):
            return ["Not", _data(tree.operand)]
        case ast.BinOp(op=ast.Sub()):
            return ["Add", _data(tree.left), ["Mul", -1, _data(tree.right)]]
        case ast.BinOp(op=ast.Div()):
            return ["Mul", _data(tree.left), ["Pow", _data(tree.right), -1]]
        case ast.BinOp() if type(tree.op) in _OPERATORS:
            return [_OPERATORS[type(tree.op)], _data(tree.left), _data(tree.right)]
        case ast.Compare(ops=[operator]) if type(operator) in _COMPARISONS:
            return [_COMPARISONS[type(operator)], _data(tree.left), _data(tree.comparators[0])]
        case ast.Call(func=ast.Name(id=name), keywords=[]) if _SHORT.get(name, name) in FUNCTIONS:
            return [_SHORT.get(name, name), *map(_data, tree.args)]
        case _:
            raise ValueError(f"'{ast.unparse(tree):.80}' is not a size")
