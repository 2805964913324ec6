"""Patterns of calls, declared as text that reads like what the calls compute.

    RMS_NORM = Formula("x * rsqrt(mean(x ** 2 | x * x, [-1], True) + eps)", eps=float)
    for found in edit.matches(RMS_NORM):
        x, eps = found["x"], found.number("eps")

The text is in Python's syntax. Its last line is the value to match; a line `name = …` before it names a part.

- `mean(a, b)` is a call of `aten.mean`, in any overload, with arguments in the order of the schema. Those left out have their
  defaults; `...` allows any. `RESHAPES(a, ...)` is a call of a family in `operators.py`. Dimensions count from
  the front or from the end; those that a variable stands for from the front.
- `a + b`, `a * b` (in either order), `a - b`, `a / b`, `a ** b` and `-a` are calls too; `a[0]` is one of several results.
- `a | b` stands for several spellings. Any other name is a variable: the same tensor wherever it stands.

Two uses of a variable may differ by casts between floating types; elsewhere `CASTS(a, ...) | a` allows one. Of the arguments of
a call, variables are matched last, so that a variable is bound where it stands deepest.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from inspect import cleandoc
from typing import NamedTuple, TypeGuard

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as families
from lissom.compiler.ir.match import number, strip_casts
from lissom.compiler.ir.program import Program

aten = torch.ops.aten

_ARITHMETIC: Mapping[type[ast.AST], object] = {
    ast.Add: aten.add, ast.Sub: aten.sub, ast.Mult: aten.mul, ast.Div: aten.div, ast.Pow: aten.pow, ast.USub: aten.neg,
}  # fmt: skip


@dataclass(frozen=True)
class Match:
    """A place where a program computes a formula.

    Attributes:
        root: the call that computes the value.
        calls: all calls of the formula.
        values: by name, of variables and parts.
    """

    root: fx.Node
    program: Program | None = None
    calls: tuple[fx.Node, ...] = ()
    values: Mapping[str, object] = field(default_factory=dict[str, object])

    def __getitem__(self, name: str) -> fx.Node:
        """The node that a name stands for."""
        found = self.values[name]
        assert isinstance(found, fx.Node), f"'{name}' is {found}"
        return found

    def number(self, name: str) -> float:
        """The number that a variable stands for."""
        found = self.values[name]
        assert isinstance(found, (int, float)), f"'{name}' is {found}"
        return found

    @property
    def is_private(self) -> bool:
        """True when nothing else in the program reads a call of the formula, apart from its root."""
        return all(node is self.root or node.users.keys() <= {*self.calls} for node in self.calls)


class _Call(NamedTuple):
    """A call in a formula.

    Attributes:
        operators: some without overload.
        any_more: arguments that are left out may have any value.
    """

    operators: Sequence[object]
    arguments: Sequence[ast.expr]
    any_more: bool = False
    commutes: bool = False


class Formula:
    """A pattern of calls.

    Args:
        text: the pattern, as the module describes it.
        where: a condition on the match.
        kinds: what variables stand for where it is no tensor: `int`, `float` (a number, or a constant of rank 0), or `object`
            (any argument).

    Raises:
        ValueError: when the text calls an unknown operator, or `kinds` has a name that does not occur in it.
    """

    def __init__(self, text: str, where: Callable[[Match], bool] | None = None, **kinds: type) -> None:
        parts = list(ast.walk(ast.parse(cleandoc(text))))
        self._where, self._kinds = where, kinds
        lines = [line for line in parts if isinstance(line, ast.Assign)]
        self._named = {name.id: line.value for line in lines for name in line.targets if isinstance(name, ast.Name)}
        self._root = next(line.value for line in parts if isinstance(line, ast.Expr))
        self._calls = {part: call for part in parts if (call := _call(part)) is not None}
        if unknown := kinds.keys() - {part.id for part in parts if isinstance(part, ast.Name)}:
            raise ValueError(f"the formula has no variable '{unknown.pop()}'")

    def match(self, node: fx.Node | None, program: Program | None = None) -> Match | None:
        """The first way in which a node computes the formula, or None.

        Args:
            program: where its constants are.
        """
        found = () if node is None else self._ways(self._root, node, Match(node, program))
        return next(filter(self._where, found), None)

    @cached_property
    def targets(self) -> Sequence[object]:
        """The operators that may compute the formula."""
        parts, found = [self._root], list[object]()
        for part in parts:
            match part:
                case ast.Name(name):
                    parts.append(self._named[name])
                case ast.BinOp(left, ast.BitOr(), right):
                    parts += (left, right)
                case _:
                    found += self._calls[part].operators
        packets = [item for item in found if isinstance(item, torch._ops.OpOverloadPacket)]
        return [*found, *(getattr(item, name) for item in packets for name in item.overloads())]

    def _ways(self, part: ast.expr, item: object, found: Match) -> Iterator[Match]:
        """The ways in which a value is a part of the formula, after what is matched already."""
        if (call := self._calls.get(part)) is not None:
            if not _calls(item, call.operators) or (given := _arguments(item, call)) is None:
                return
            for values in (given, given[::-1]) if call.commutes else (given,):
                for one in self._all(sorted(zip(call.arguments, values, strict=True), key=self._is_variable), found):
                    yield Match(one.root, one.program, (*one.calls, item), one.values)
            return
        match part:
            case ast.Name(name) if name in self._named:
                known = found.values.get(name)
                for one in self._ways(self._named[name], item, found) if known is None else (found,) if known is item else ():
                    yield Match(one.root, one.program, one.calls, {**one.values, name: item})
            case ast.Name(name):
                kind = self._kinds.get(name, torch.Tensor)
                value = number(found.program, item) if kind is float else item
                known = found.values.get(name, value)
                fits = nodes.is_tensor(value) if kind is torch.Tensor else isinstance(value, kind)
                if fits and (known == value or _uncast(known) is _uncast(value)):
                    yield Match(found.root, found.program, found.calls, {name: value, **found.values})
            case ast.BinOp(left, ast.BitOr(), right):
                yield from self._ways(left, item, found)
                yield from self._ways(right, item, found)
            case ast.List(parts):
                if isinstance(item, (list, tuple)) and len(item) == len(parts):
                    yield from self._all(list(zip(parts, item, strict=True)), found)
            case _:
                value = ast.literal_eval(part)
                if item == value or (isinstance(value, (int, float)) and number(found.program, item) == value):
                    yield found

    def _all(self, parts: Sequence[tuple[ast.expr, object]], found: Match) -> Iterator[Match]:
        """The ways in which all these values are their parts."""
        if not parts:
            yield found
            return
        (part, item), *rest = parts
        for one in self._ways(part, item, found):
            yield from self._all(rest, one)

    def _is_variable(self, pair: tuple[ast.expr, object]) -> bool:
        return isinstance(pair[0], ast.Name) and pair[0].id not in self._named


def _call(part: ast.AST) -> _Call | None:
    """The call that a part of a formula is; None for any other part."""
    match part:
        case ast.UnaryOp(ast.USub(), ast.Constant()) | ast.BinOp(_, ast.BitOr(), _):
            return None
        case ast.UnaryOp(kind, value) if type(kind) in _ARITHMETIC:
            return _Call((_ARITHMETIC[type(kind)],), [value])
        case ast.BinOp(left, kind, right) if type(kind) in _ARITHMETIC:
            return _Call((_ARITHMETIC[type(kind)],), [left, right], commutes=isinstance(kind, (ast.Add, ast.Mult)))
        case ast.Subscript(value, index):
            return _Call((operator.getitem,), [value, index])
        case ast.Call(ast.Name(name), arguments) if hasattr(families if name.isupper() else aten, name):
            operators = getattr(families, name) if name.isupper() else (getattr(aten, name),)
            any_more = bool(arguments) and ast.unparse(arguments[-1]) == "..."
            return _Call(operators, arguments[: len(arguments) - any_more], any_more)
        case ast.UnaryOp() | ast.BinOp() | ast.Call():
            raise ValueError(f"the formula calls an unknown operator: '{ast.unparse(part)}'")
        case _:
            return None


def _calls(node: object, operators: Container[object]) -> TypeGuard[fx.Node]:
    """True when a node calls one of the operators, or an overload of one."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return node.target in operators or getattr(node.target, "overloadpacket", None) in operators


def _uncast(value: object) -> object:
    return strip_casts(value) if isinstance(value, fx.Node) else value


def _arguments(node: fx.Node, call: _Call) -> Sequence[object] | None:
    """The arguments of a node for those of a call; None where there are too few, or one that is left out is no default."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args
    parameters, args = _parameters(node.target), node.args
    given = [args[at] if at < len(args) else node.kwargs.get(name, default) for at, (name, default) in enumerate(parameters)]
    count = len(call.arguments)
    if len(given) < count or not (call.any_more or given[count:] == [default for _, default in parameters[count:]]):
        return None
    for at, (name, _) in enumerate(parameters[:count]):
        if name.startswith("dim"):
            rank = max((nodes.tensor_value(item).dim() for item in (node, given[0]) if nodes.is_tensor(item)), default=0)
            given[at] = _dim(given[at], call.arguments[at], rank)
    return given[:count]


@cache
def _parameters(target: torch._ops.OpOverload) -> Sequence[tuple[str, object]]:
    """The names and the defaults of an operator's parameters."""
    return [(item.name, item.default_value) for item in target._schema.arguments]


def _dim(value: object, part: ast.expr, rank: int) -> object:
    """A dimension or a list of them, counted as the formula does."""
    if isinstance(value, (list, tuple)) and isinstance(part, ast.List) and len(value) == len(part.elts):
        return [_dim(item, one, rank) for item, one in zip(value, part.elts, strict=True)]
    return value % rank - rank * isinstance(part, ast.UnaryOp) if isinstance(value, int) and rank else value
