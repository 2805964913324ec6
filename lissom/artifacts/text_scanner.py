"""The characters of a program's text, read from left to right: names, types and sizes. No code in it is run."""

from __future__ import annotations

import ast
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import NoReturn, cast

import sympy
import torch

from lissom.artifacts.expression import FUNCTIONS, decode_expression
from lissom.compiler.ir.types import ScalarType, Size, TensorType, ValueType, short_dtype
from lissom.errors import ArtifactError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
DTYPES = {short_dtype(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_DEVICE = re.compile(r"[a-z]+(?::\d+)?")
_QUOTED = re.compile(r"'(?:[^'\\\n]|\\.)*'" r'|"(?:[^"\\\n]|\\.)*"')
_KINDS: Mapping[str, type] = {"int": int, "float": float, "bool": bool}
MOST_CHARACTERS = 2000
"""The most characters of a size."""
_COMPARISONS: Mapping[type[ast.cmpop], str] = {
    ast.Eq: "Equality",
    ast.NotEq: "Unequality",
    ast.Lt: "StrictLessThan",
    ast.LtE: "LessThan",
    ast.Gt: "StrictGreaterThan",
    ast.GtE: "GreaterThan",
}
_OPERATORS: Mapping[type[ast.operator], str] = {
    ast.Add: "Add",
    ast.Mult: "Mul",
    ast.Pow: "Pow",
    ast.FloorDiv: "FloorDiv",
    ast.Mod: "Mod",
    ast.BitAnd: "And",
    ast.BitOr: "Or",
}
_SHORT = {"Eq": "Equality", "Ne": "Unequality"}


class Scanner:
    """The text, and the place in it: `at` is the index of the next character. `symbols`: the sizes by name."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.symbols: dict[str, sympy.Symbol] = {}

    def peek(self, part: str) -> bool:
        return self.text.startswith(part, self.at)

    def accept(self, part: str) -> bool:
        is_next = self.peek(part)
        self.at += is_next * len(part)
        return is_next

    def expect(self, part: str) -> None:
        if not self.accept(part):
            self.fail(f"expected {part.strip() or part!r}")

    def take(self, pattern: re.Pattern[str], what: str) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            self.fail(f"expected {what}")
        self.at = match.end()
        return match.group()

    def items(self, end: str) -> Generator[None]:
        """Once for each item up to `end`, behind the commas between them."""
        first = True
        while not self.accept(end):
            if not first:
                self.expect(", ")
            first = False
            yield

    @contextmanager
    def told_at(self, at: int) -> Generator[None]:
        """Tell a ValueError with the place `at` in the text."""
        try:
            yield
        except ValueError as error:
            self.fail(str(error), at)

    def fail(self, problem: str, at: int | None = None, kind: type[ArtifactError] = ArtifactError) -> NoReturn:
        at = self.at if at is None else at
        line = self.text.count("\n", 0, at) + 1
        column = at - self.text.rfind("\n", 0, at)
        raise kind(f"line {line}, column {column} of the program's text: {problem}")

    def end_of_expression(self) -> int:
        """The index behind the expression or literal that begins here: of a comma or bracket, or of the end of the line."""
        depth, at = 0, self.at
        while at < len(self.text):
            quoted = _QUOTED.match(self.text, at)
            character = self.text[at]
            if quoted:
                at = quoted.end()
                continue
            if depth == 0 and (character in ")]},\n" or self.text.startswith(" = ", at)):
                return at
            depth += (character in "([{") - (character in ")]}")
            at += 1
        return at

    def value_type(self, *, declare: bool = False, named: bool = False) -> ValueType:
        """A type.

        Args:
            declare: names in its sizes are new sizes.
            named: names that are none stand for sizes found while running.
        """
        if self.accept("none"):
            return None
        if self.accept("("):
            return tuple(self.value_type(declare=declare, named=named) for _ in self.items(")"))
        start = self.at
        word = self.take(NAME, "a type, such as f32[batch, 4]")
        if word in _KINDS and self.accept(" "):
            return ScalarType(_KINDS[word], self._size(declare, named))
        if word not in DTYPES:
            self.fail(f"there is no dtype '{word}'; there are {', '.join(sorted(DTYPES))}", start)
        self.expect("[")
        shape = tuple(self._size(declare, named) for _ in self.items("]"))
        device = self.take(_DEVICE, "a device, such as cuda:0") if self.accept("@") else "cpu"
        return TensorType(DTYPES[word], shape, torch.device(device))

    def _size(self, declare: bool, named: bool) -> Size:
        start, end = self.at, self.end_of_expression()
        with self.told_at(start):
            data, names = _expression_data(self.text[start:end])
            for name in names - self.symbols.keys():
                self._new_symbol(name, declare, named)
            try:
                size = decode_expression(data, self.symbols)
            except ArithmeticError as error:
                raise ValueError(f"'{self.text[start:end]:.80}' is not a size: {error}") from None
        self.at = end
        return int(size) if isinstance(size, sympy.Integer) else cast(Size, size)

    def _new_symbol(self, name: str, declare: bool, named: bool) -> None:
        numbered = re.fullmatch(r"u(\d+)", name) if named else None
        if declare:
            self.symbols[name] = sympy.Symbol(name, positive=True, integer=True)
        elif numbered:
            self.expect_size(int(numbered[1]))
            self.symbols[name] = sympy.Symbol(name, integer=True)
        else:
            raise ValueError(f"no argument has the size '{name}'")

    def expect_size(self, number: int) -> None:
        """Called where the text first has the size `u` with this number, which an operator finds while it runs."""


def _expression_data(text: str) -> tuple[object, set[str]]:
    """The expression as data, and the names in it.

    Raises:
        ValueError: for anything but numbers, names, arithmetic, comparisons and the functions of sizes.
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
        case ast.Call(
            func=ast.Name(id="Piecewise" as name),
            args=[ast.Tuple(elts=[x, condition]), ast.Tuple(elts=[other, ast.Constant(value=True)])],
            keywords=[],
        ):
            return [name, _data(x), _data(condition), _data(other)]
        case ast.Call(func=ast.Name(id=name), keywords=[]) if _SHORT.get(name, name) in FUNCTIONS:
            return [_SHORT.get(name, name), *map(_data, tree.args)]
        case _:
            raise ValueError(f"'{ast.unparse(tree):.80}' is not a size")
