"""Reading a program's text: the inverse of `lissom.compiler.ir.printer`, so that a program can be written by hand.

A text does not hold all of a program. Weights get random values, from a generator seeded by their names; a size gets a number
at the example, which may be given; what a call returns is a tuple of the outputs, or the only one. Types are inferred anew from
the operators and compared with the text. The operators that a text may call are those of an artifact; no code in it is run.
"""

from __future__ import annotations

import ast
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from lissom.artifacts.calls import check_call
from lissom.artifacts.expression import decode_expression
from lissom.artifacts.operators import FUNCTIONS, find_operator
from lissom.artifacts.program_file import MOST_NODES, check_weight_name
from lissom.artifacts.text_expression import expression_data
from lissom.artifacts.weights import check_memory
from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.fake import FlatModule, SymbolFact
from lissom.compiler.ir.node import Origin
from lissom.compiler.ir.printer import target_text
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.signature import Argument, ConstantArgument, Dimension, Leaf, Signature, TensorArgument
from lissom.compiler.ir.types import ScalarType, Size, TensorType, ValueType, format_type, short_dtype
from lissom.errors import ArtifactError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PATH = re.compile(r"[A-Za-z_][\w.]*(?:\[[^\]\n]*\][\w.]*)*")
_TARGET = re.compile(r"[A-Za-z_][\w.]*")
_WEIGHT = re.compile(r"[^\s,:()\[\]]+")
_NUMBER = re.compile(r"-?(?:inf|nan|\d[\d.]*(?:e[-+]?\d+)?j?)")
_DEVICE = re.compile(r"[a-z]+(?::\d+)?")
_DTYPES = {short_dtype(item): item for item in vars(torch).values() if isinstance(item, torch.dtype)}
_WORDS: Mapping[str, object] = {
    "True": True,
    "False": False,
    "None": None,
    "end": 2**63 - 1,
    "inf": float("inf"),
    "nan": float("nan"),
    **_DTYPES,
    **{name: torch.device(name) for name in ("cpu", "cuda", "meta")},
    **{name: getattr(torch, name) for name in ("strided", "contiguous_format", "preserve_format", "channels_last")},
    "channels_last_3d": torch.channels_last_3d,
}
_KINDS: Mapping[str, type] = {"int": int, "float": float, "bool": bool}
_TARGETS = {target_text(function): name for name, function in FUNCTIONS.items()}
_HINTS = (4, 16, 8, 24, 32, 12)
"""Sizes at the example where none are given: no two alike, and divisible by small blocks."""


def parse_program(text: str, sizes: Mapping[str, int] | None = None) -> Program:
    """The program that a text describes, which prints as this text.

    sizes: numbers at the example for sizes by name, `{"batch": 2, "sequence": 64}`.

    Raises: ArtifactError with line, column and what was expected; for an operator that is unknown, or that returns another type
    than the text says.

    >>> from lissom.artifacts.program_text import parse_program
    >>> text = "program Twice(x: f32[batch, 4]) {\\n  %mul: f32[batch, 4] = aten.mul.Tensor(%x, 2)\\n  return [%mul]\\n}\\n"
    >>> program = parse_program(text)
    >>> program.text() == text, program(torch.ones(1, 4))
    (True, tensor([[2., 2., 2., 2.]]))
    """
    return _Parser(text, sizes or {}).program()


class _Parser:
    """A recursive-descent parser over one text; `at` is the index of the current character."""

    def __init__(self, text: str, sizes: Mapping[str, int]) -> None:
        self.text = text
        self.at = 0
        self.sizes = sizes
        self.symbols: dict[str, sympy.Symbol] = {}
        self.graph = fx.Graph()
        self.values: dict[str, fx.Node] = {}
        self.reads: dict[str, fx.Node] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.bytes = 0
        self.state: list[str] = []
        self.mode = fake.symbolic_mode({}, ())

    def program(self) -> Program:
        self._expect("program ")
        name = self._take(re.compile(r"[^\s({}]+"), "the program's name")
        signature = self._signature()
        self.mode = fake.symbolic_mode(self._facts(signature), ())
        for leaf in signature.tensors:
            self._placeholder(leaf)
        self._expect(" {\n")
        while self._accept("  weight @"):
            self._weight()
        while self._accept("  %"):
            self._call()
            if len(self.values) > MOST_NODES:
                self._fail(f"the program has more than {MOST_NODES} nodes")
        self._expect("  return ")
        start = self.at
        outputs = self._list()
        self._expect("\n}\n")
        if self.at < len(self.text):
            self._fail("expected the end of the text after the program")
        self.graph.create_node("output", "output", (tuple(outputs),), name="output")
        leaf = pytree.tree_structure(0)
        out_spec = leaf if len(outputs) == 1 else pytree.tree_structure(tuple(0 for _ in outputs))
        signature = Signature(*self._arguments(signature), out_spec, signature.dimensions)
        state = tuple(self.state)
        program = Program(name, FlatModule(self.weights, self.graph), signature, state)
        for node in program.nodes(*nodes.STATE_WRITES):
            if not nodes.is_state_write(node) or str(cast(fx.Node, node.args[0]).target) not in state:
                self._fail(f"'{node.name}' writes to a buffer that is not state of the program", start)
        return program

    # The signature

    def _signature(self) -> Signature:
        self._expect("(")
        positional: list[Argument] = []
        keyword: list[Argument] = []
        chosen = positional
        while not self._accept(")"):
            if positional or keyword or chosen is keyword:
                self._expect(", ")
            if self._accept("*"):
                chosen = keyword
                continue
            chosen.append(self._argument())
        dimensions = {symbol: Dimension(name, 1, None) for name, symbol in self.symbols.items()}
        return Signature(tuple(positional), tuple(keyword), (), pytree.tree_structure(0), dimensions)

    def _argument(self) -> Argument:
        leaves: list[Leaf] = []
        if self._accept("{"):
            while not self._accept("}"):
                if leaves:
                    self._expect(", ")
                leaves.append(self._leaf())
        else:
            leaves.append(self._leaf())
        paths = [leaf.path for leaf in leaves]
        name = cast(re.Match[str], _NAME.match(paths[0])).group() if paths else ""
        spec = pytree.tree_structure(0) if paths == [name] else pytree.tree_structure(tuple(0 for _ in paths))
        return Argument(name, spec, tuple(leaves))

    def _leaf(self) -> Leaf:
        path = self._take(_PATH, "an argument of the program")
        if self._accept("="):
            return ConstantArgument(path, self._literal())
        self._expect(": ")
        start = self.at
        found = self._type(declare=True)
        if not isinstance(found, TensorType):
            self._fail("an argument has the type of a tensor, such as f32[batch, 4]", start)
        return TensorArgument(path, found)

    def _literal(self) -> object:
        """A Python literal, up to the comma or bracket behind it."""
        start = self.at
        end = self._end_of_expression()
        try:
            found = ast.literal_eval(self.text[start:end])
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            self._fail(f"'{self.text[start:end]}' is no number, text, list, tuple or dict", start)
        self.at = end
        return found

    def _arguments(self, signature: Signature) -> tuple[tuple[Argument, ...], tuple[Argument, ...], tuple[str, ...]]:
        names = tuple(item.name for item in (*signature.positional, *signature.keyword))
        return signature.positional, signature.keyword, names

    def _facts(self, signature: Signature) -> dict[sympy.Symbol, SymbolFact]:
        unknown = self.sizes.keys() - self.symbols.keys()
        if unknown:
            self._fail(f"the program has no size {min(unknown)!r}; its sizes: {', '.join(self.symbols) or 'none'}", 0)
        hints = dict(zip(self.symbols, _HINTS * len(self.symbols), strict=False)) | dict(self.sizes)
        return {symbol: SymbolFact(hints[name], 1, None) for name, symbol in self.symbols.items()}

    def _placeholder(self, leaf: TensorArgument) -> None:
        name = re.sub(r"\W+", "_", leaf.path).strip("_")
        node = self.graph.create_node("placeholder", name, name=name)
        nodes.set_value(node, fake.fake_tensor(self.mode, leaf.type, _contiguous(leaf.type.shape)))
        self.values[name] = node

    # The lines of weights and calls

    def _weight(self) -> None:
        start = self.at
        name = self._take(_WEIGHT, "a weight's name")
        try:
            check_weight_name(name)
        except ValueError as error:
            self._fail(str(error), start)
        self._expect(": ")
        found = self._type()
        if not isinstance(found, TensorType) or any(not isinstance(size, int) for size in found.shape):
            self._fail("a weight has the type of a tensor with fixed sizes", start)
        if self._accept(" state"):
            self.state.append(name)
        self._expect("\n")
        self.bytes += math.prod(cast("tuple[int, ...]", found.shape)) * found.dtype.itemsize
        try:
            check_memory(self.bytes, "the program's weights")
        except ValueError as error:
            self._fail(str(error), start)
        if name not in self.weights:
            self.weights[name] = _random(name, found)
        node = self.graph.create_node("get_attr", name)
        nodes.set_value(node, fake.fake_weight(self.mode, self.weights[name]))
        self.reads.setdefault(name, node)

    def _call(self) -> None:
        start = self.at
        name = self._take(_NAME, "the name of a value")
        if name in self.values:
            self._fail(f"there is a value '%{name}' already", start)
        self._expect(": ")
        typed = self.at
        self._type(named=True)
        written = self.text[typed : self.at]
        self._expect(" = ")
        target, args, kwargs = self._target_and_arguments()
        path = ""
        if self._accept("  # "):
            path = self._take(re.compile(r"[^\n]+"), "a module's path")
        self._expect("\n")
        node = self.graph.create_node("call_function", target, tuple(args), kwargs, name=name)
        if node.name != name:
            self._fail(f"'{name}' is no name a value can have", start)
        if path:
            nodes.set_origin(node, Origin(path))
        try:
            nodes.set_value(node, fake.fake_call(self.mode, node))
        except Exception as error:
            self._fail(f"{target_text(target)} refuses its arguments: {str(error).splitlines()[0]}", start)
        found = format_type(nodes.node_type(node), self._name_of)
        if found != written and not self._same(node, typed):
            self._fail(f"{target_text(target)} returns {found} here, and not {written}", typed)
        self.values[name] = node

    def _same(self, node: fx.Node, typed: int) -> bool:
        """Whether the type in the text is equal to the inferred one for all sizes."""
        after, self.at = self.at, typed
        found = self._type(named=True)
        self.at = after
        return fake.same_type(self.mode, nodes.node_type(node), found)

    def _target_and_arguments(self) -> tuple[Any, list[object], dict[str, object]]:
        start = self.at
        name = self._take(_TARGET, "an operator")
        full = _TARGETS.get(name) or (name if name.count(".") == 2 else f"{name}.default")
        try:
            target = find_operator(full)
        except ValueError as error:
            self._fail(str(error), start)
        self._expect("(")
        args: list[object] = []
        kwargs: dict[str, object] = {}
        while not self._accept(")"):
            if args or kwargs:
                self._expect(", ")
            keyword = re.compile(r"([A-Za-z_]\w*)=").match(self.text, self.at)
            if keyword:
                self.at = keyword.end()
                kwargs[keyword[1]] = self._value()
            else:
                args.append(self._value())
        try:
            check_call(target, args, kwargs)
        except ValueError as error:
            self._fail(str(error), start)
        return target, args, kwargs

    def _value(self) -> Any:
        start = self.at
        if self._accept("%"):
            name = self._take(_NAME, "the name of a value")
            if name not in self.values:
                self._fail(f"there is no value '%{name}' above", start)
            return self.values[name]
        if self._accept("@"):
            name = self._take(_WEIGHT, "a weight's name")
            if name not in self.reads:
                self._fail(f"there is no weight '@{name}' above", start)
            return self.reads[name]
        if self._peek("["):
            return self._list()
        if self._peek("'") or self._peek('"') or self._peek("slice("):
            return self._quoted()
        word = _NAME.match(self.text, self.at)
        if word and word.group() in _WORDS:
            self.at = word.end()
            if isinstance(_WORDS[word.group()], torch.device) and self._accept(":"):
                return torch.device(word.group(), int(self._take(re.compile(r"\d+"), "a device's number")))
            return _WORDS[word.group()]
        number = self._take(_NUMBER, "%value, @weight, a number, a list, a dtype, True, False or None")
        try:
            return float(number) if number.lstrip("-") in ("inf", "nan") else ast.literal_eval(number)
        except (ValueError, SyntaxError):
            self._fail(f"'{number}' is no number", start)

    def _quoted(self) -> object:
        if not self._peek("slice("):
            return self._literal()
        self._expect("slice(")
        parts = [self._value()]
        while self._accept(", "):
            parts.append(self._value())
        self._expect(")")
        return slice(*parts)

    def _list(self) -> list[object]:
        self._expect("[")
        found: list[object] = []
        while not self._accept("]"):
            if found:
                self._expect(", ")
            found.append(self._value())
        return found

    # Types

    def _type(self, *, declare: bool = False, named: bool = False) -> ValueType:
        """A type. declare: names in its sizes are new sizes. named: names that are none stand for sizes found while running."""
        if self._accept("none"):
            return None
        if self._accept("("):
            parts: list[ValueType] = []
            while not self._accept(")"):
                if parts:
                    self._expect(", ")
                parts.append(self._type(declare=declare, named=named))
            return tuple(parts)
        start = self.at
        word = self._take(_NAME, "a type, such as f32[batch, 4]")
        if word in _KINDS and self._accept(" "):
            return ScalarType(_KINDS[word], self._size(declare, named))
        if word not in _DTYPES:
            self._fail(f"there is no dtype '{word}'; there are {', '.join(sorted(_DTYPES))}", start)
        self._expect("[")
        shape: list[Size] = []
        while not self._accept("]"):
            if shape:
                self._expect(", ")
            shape.append(self._size(declare, named))
        device = self._take(_DEVICE, "a device, such as cuda:0") if self._accept("@") else "cpu"
        return TensorType(_DTYPES[word], tuple(shape), torch.device(device))

    def _size(self, declare: bool, named: bool) -> Size:
        start, end = self.at, self._end_of_expression()
        written = self.text[start:end]
        try:
            data, names = expression_data(written)
            for name in names - self.symbols.keys():
                if not declare and not named:
                    raise ValueError(f"no argument has the size '{name}'")
                self._new_symbol(name, declare)
            found = decode_expression(data, self.symbols)
        except ValueError as error:
            self._fail(str(error), start)
        self.at = end
        return int(found) if isinstance(found, sympy.Integer) else cast(Size, found)

    def _new_symbol(self, name: str, declare: bool) -> None:
        if declare:
            self.symbols[name] = sympy.Symbol(name, positive=True, integer=True)
            return
        numbered = re.fullmatch(r"u(\d+)", name)
        if numbered is None:
            raise ValueError(f"no argument has the size '{name}'")
        # The next size that an operator finds while it runs is to have this name.
        fake.number_sizes_from(self.mode, int(numbered[1]))
        self.symbols[name] = sympy.Symbol(name, integer=True)

    def _name_of(self, expression: sympy.Expr) -> str:
        return str(expression)

    def _end_of_expression(self) -> int:
        """The index behind the expression or literal that begins here: of a comma or bracket, or of the end of the line."""
        depth, quote = 0, ""
        for at in range(self.at, len(self.text)):
            character = self.text[at]
            if quote:
                quote = "" if character == quote and self.text[at - 1] != "\\" else quote
            elif character in "'\"":
                quote = character
            elif character in "([{":
                depth += 1
            elif depth == 0 and (character in ")]},\n" or self.text.startswith(" = ", at)):
                return at
            elif character in ")]}":
                depth -= 1
        return len(self.text)

    # Characters

    def _peek(self, part: str) -> bool:
        return self.text.startswith(part, self.at)

    def _accept(self, part: str) -> bool:
        found = self._peek(part)
        self.at += found * len(part)
        return found

    def _expect(self, part: str) -> None:
        if not self._accept(part):
            self._fail(f"expected {part.strip() or part!r}")

    def _take(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            self._fail(f"expected {what}")
        self.at = found.end()
        return found.group()

    def _fail(self, problem: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        line = self.text.count("\n", 0, at) + 1
        column = at - self.text.rfind("\n", 0, at)
        raise ArtifactError(f"line {line}, column {column} of the program's text: {problem}")


def _contiguous(shape: Sequence[Size]) -> Sequence[Size]:
    """The strides of a contiguous tensor."""
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]  # pyright: ignore[reportCallIssue, reportArgumentType]


def _random(name: str, found: TensorType) -> torch.Tensor:
    """A weight with values that depend on its name alone: normal with a variance of 1 / its last size; integers are 0."""
    if not found.dtype.is_floating_point:
        return torch.full(cast("tuple[int, ...]", found.shape), found.dtype == torch.bool, dtype=found.dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    shape = cast("tuple[int, ...]", found.shape)
    return (torch.randn(shape, generator=generator) / max(1, *shape[-1:], 1) ** 0.5).to(found.dtype)
