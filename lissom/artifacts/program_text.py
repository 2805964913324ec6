"""Reading a program's text: the inverse of `lissom.compiler.ir.printer`, so that a program can be written by hand.

A text does not hold all of a program. Weights get random values, from a generator seeded by their names; a size gets a number
at the example, which may be given, and at which the operators return the types that the text says; what a call returns is a
tuple of the outputs, or the only one. Types are inferred anew from the operators and compared with the text. The operators that
a text may call are those of an artifact; no code in it is run.
"""

from __future__ import annotations

import ast
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from lissom.artifacts.calls import check_call
from lissom.artifacts.example_sizes import default_sizes, other_sizes
from lissom.artifacts.operators import FUNCTIONS, find_operator
from lissom.artifacts.program_file import MOST_NODES, check_weight_name, check_writes
from lissom.artifacts.text_scanner import DTYPES, NAME, Scanner
from lissom.artifacts.weights import check_memory
from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.fake import FlatModule, SymbolFact
from lissom.compiler.ir.node import Origin
from lissom.compiler.ir.printer import END, target_text
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.signature import Argument, ConstantArgument, Dimension, Leaf, Signature, TensorArgument
from lissom.compiler.ir.types import Size, TensorType, are_fixed, fixed, format_type
from lissom.errors import ArtifactError

_PATH = re.compile(r"[A-Za-z_][\w.]*(?:\[[^\]\n]*\][\w.]*)*")
_TARGET = re.compile(r"[A-Za-z_][\w.]*")
_WEIGHT = re.compile(r"[^\s,:()\[\]]+")
_NUMBER = re.compile(r"\([-+.\w]+j\)|-?(?:inf|nan|\d[\d.]*(?:e[-+]?\d+)?)j?")
_WORDS: Mapping[str, object] = {
    "True": True,
    "False": False,
    "None": None,
    "end": END,
    "inf": float("inf"),
    "nan": float("nan"),
    **DTYPES,
    **{name: torch.device(name) for name in ("cpu", "cuda", "meta")},
    **{name: getattr(torch, name) for name in ("strided", "contiguous_format", "preserve_format", "channels_last")},
    "channels_last_3d": torch.channels_last_3d,
}
_TARGETS = {target_text(function): name for name, function in FUNCTIONS.items()}


def parse_program(text: str, sizes: Mapping[str, int] | None = None) -> Program:
    """The program that a text describes, which prints as this text.

    Args:
        sizes: numbers at the example for sizes by name, `{"batch": 2, "sequence": 64}`.

    Raises:
        ArtifactError: with line, column and what was expected; for an operator that is unknown, or that returns another type
            than the text says.

    Examples:
        >>> import torch
        >>> from lissom.artifacts.program_text import parse_program
        >>> text = "program Twice(x: f32[batch, 4]) {\\n  %mul: f32[batch, 4] = aten.mul.Tensor(%x, 2)\\n  return [%mul]\\n}\\n"
        >>> program = parse_program(text)
        >>> program.text() == text, program(torch.ones(1, 4))
        (True, tensor([[2., 2., 2., 2.]]))
    """
    given = sizes or {}
    parser = _Parser(text, given)
    try:
        return parser.program()
    except RecursionError:
        parser.fail("the text is nested too deeply")
    except _RefusedCallError:
        for found in other_sizes(text, parser.dimensions, given):
            with suppress(_RefusedCallError):
                return _Parser(text, found).program()
        raise


class _RefusedCallError(ArtifactError):
    """A call has no result at these sizes of the example, or one of another type."""


class _Parser(Scanner):
    """A recursive-descent parser over one text."""

    def __init__(self, text: str, sizes: Mapping[str, int]) -> None:
        super().__init__(text)
        self.sizes = sizes
        self.graph = fx.Graph()
        self.values: dict[str, fx.Node] = {}
        self.reads: dict[str, fx.Node] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.bytes = 0
        self.state: list[str] = []
        self.dimensions: dict[str, sympy.Symbol] = {}
        self.mode = fake.symbolic_mode({}, ())

    def program(self) -> Program:
        self.expect("program ")
        name = self.take(re.compile(r"[^\s({}]+"), "the program's name")
        signature = self._signature()
        self.mode = fake.symbolic_mode(self._facts(signature), ())
        for leaf in signature.tensors:
            self._placeholder(leaf)
        self.expect(" {\n")
        while self.accept("  weight @"):
            self._weight()
        while self.accept("  %"):
            self._call()
            if len(self.values) > MOST_NODES:
                self.fail(f"the program has more than {MOST_NODES} nodes")
        self.expect("  return ")
        start = self.at
        outputs = self._list()
        self.expect("\n}\n")
        if self.at < len(self.text):
            self.fail("expected the end of the text after the program")
        self.graph.create_node("output", "output", (tuple(outputs),), name="output")
        leaf = pytree.tree_structure(0)
        out_spec = leaf if len(outputs) == 1 else pytree.tree_structure(tuple(0 for _ in outputs))
        signature = replace(signature, out_spec=out_spec)
        state = tuple(self.state)
        program = Program(name, FlatModule(self.weights, self.graph), signature, state)
        with self.told_at(start):
            check_writes(program)
        return program

    # The signature

    def _signature(self) -> Signature:
        self.expect("(")
        positional: list[Argument] = []
        keyword: list[Argument] = []
        chosen = positional
        for _ in self.items(")"):
            if self.accept("*"):
                chosen = keyword
            else:
                chosen.append(self._argument())
        names = tuple(argument.name for argument in (*positional, *keyword))
        dimensions = {symbol: Dimension(name, 1, None) for name, symbol in self.symbols.items()}
        return Signature(tuple(positional), tuple(keyword), names, pytree.tree_structure(0), dimensions)

    def _argument(self) -> Argument:
        leaves = [self._leaf() for _ in self.items("}")] if self.accept("{") else [self._leaf()]
        paths = [leaf.path for leaf in leaves]
        match = NAME.match(paths[0]) if paths else None
        name = "" if match is None else match.group()
        spec = pytree.tree_structure(0) if paths == [name] else pytree.tree_structure(tuple(0 for _ in paths))
        return Argument(name, spec, tuple(leaves))

    def _leaf(self) -> Leaf:
        path = self.take(_PATH, "an argument of the program")
        if self.accept("="):
            return ConstantArgument(path, self._literal())
        self.expect(": ")
        start = self.at
        leaf_type = self.value_type(declare=True)
        if not isinstance(leaf_type, TensorType):
            self.fail("an argument has the type of a tensor, such as f32[batch, 4]", start)
        return TensorArgument(path, leaf_type)

    def _literal(self) -> object:
        """A Python literal, up to the comma or bracket behind it."""
        start = self.at
        end = self.end_of_expression()
        try:
            literal = ast.literal_eval(self.text[start:end])
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            self.fail(f"'{self.text[start:end]}' is no number, text, list, tuple or dict", start)
        self.at = end
        return literal

    def _facts(self, signature: Signature) -> dict[sympy.Symbol, SymbolFact]:
        unknown = self.sizes.keys() - self.symbols.keys()
        if unknown:
            self.fail(f"the program has no size {min(unknown)!r}; its sizes: {', '.join(self.symbols) or 'none'}", 0)
        self.dimensions = dict(self.symbols)
        hints = default_sizes(self.symbols, self.sizes)
        return {symbol: SymbolFact(hints[name], 1, None) for name, symbol in self.symbols.items()}

    def _placeholder(self, leaf: TensorArgument) -> None:
        name = re.sub(r"\W+", "_", leaf.path).strip("_")
        node = self.graph.create_node("placeholder", name, name=name)
        try:
            value = fake.fake_tensor(self.mode, leaf.type, _contiguous(leaf.type.shape))
        except RuntimeError as error:
            self.fail(f"'{leaf.path}' cannot be of its type: {str(error).splitlines()[0]}")
        nodes.set_value(node, value)
        # An input of a builtin's name, such as `input`, has another one in the graph: `input_1`.
        self.values[node.name] = node

    # The lines of weights and calls

    def _weight(self) -> None:
        start = self.at
        name = self.take(_WEIGHT, "a weight's name")
        with self.told_at(start):
            check_weight_name(name)
        self.expect(": ")
        weight_type = self.value_type()
        if not isinstance(weight_type, TensorType) or not are_fixed(weight_type.shape):
            self.fail("a weight has the type of a tensor with fixed sizes", start)
        if self.accept(" state"):
            self.state.append(name)
        self.expect("\n")
        self.bytes += math.prod(weight_type.shape) * weight_type.dtype.itemsize
        with self.told_at(start):
            check_memory(self.bytes, "the program's weights")
        if name not in self.weights:
            self.weights[name] = _random(name, weight_type)
        node = self.graph.create_node("get_attr", name)
        nodes.set_value(node, fake.fake_weight(self.mode, self.weights[name]))
        self.reads.setdefault(name, node)

    def _call(self) -> None:
        start = self.at
        name = self.take(NAME, "the name of a value")
        if name in self.values:
            self.fail(f"there is a value '%{name}' already", start)
        self.expect(": ")
        typed = self.at
        wanted = self.value_type(named=True)
        written = self.text[typed : self.at]
        self.expect(" = ")
        target, args, kwargs = self._target_and_arguments()
        path = ""
        if self.accept("  # "):
            path = self.take(re.compile(r"[^\n]+"), "a module's path")
        self.expect("\n")
        node = self.graph.create_node("call_function", target, tuple(args), kwargs, name=name)
        if node.name != name:
            self.fail(f"'{name}' is no name a value can have", start)
        if path:
            nodes.set_origin(node, Origin(path))
        try:
            nodes.set_value(node, fake.fake_call(self.mode, node))
            if nodes.is_call(node, torch.ops.aten._assert_scalar.default):
                fake.assume(nodes.argument(node, "self"))
        except Exception as error:
            problem = f"{target_text(target)} refuses its arguments: {str(error).splitlines()[0]}"
            self.fail(problem, start, _RefusedCallError)
        returned = format_type(nodes.node_type(node), str)
        if returned != written:
            if not fake.same_type(self.mode, nodes.node_type(node), wanted):
                self.fail(f"{target_text(target)} returns {returned} here, and not {written}", typed, _RefusedCallError)
            nodes.set_value(node, fake.spelled(self.mode, nodes.value(node), wanted))
        self.values[name] = node

    def expect_size(self, number: int) -> None:
        fake.number_sizes_from(self.mode, number)

    def _target_and_arguments(self) -> tuple[Any, list[Any], dict[str, Any]]:
        start = self.at
        name = self.take(_TARGET, "an operator")
        full = _TARGETS.get(name) or (name if name.count(".") == 2 else f"{name}.default")
        with self.told_at(start):
            target = find_operator(full)
        self.expect("(")
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for _ in self.items(")"):
            keyword = re.compile(r"([A-Za-z_]\w*)=").match(self.text, self.at)
            if keyword:
                self.at = keyword.end()
                kwargs[keyword[1]] = self._value()
            else:
                args.append(self._value())
        with self.told_at(start):
            check_call(target, args, kwargs)
        return target, args, kwargs

    def _value(self) -> Any:
        start = self.at
        if self.accept("%"):
            name = self.take(NAME, "the name of a value")
            if name not in self.values:
                self.fail(f"there is no value '%{name}' above", start)
            return self.values[name]
        if self.accept("@"):
            name = self.take(_WEIGHT, "a weight's name")
            if name not in self.reads:
                self.fail(f"there is no weight '@{name}' above", start)
            return self.reads[name]
        if self.peek("["):
            return self._list()
        if self.peek("'") or self.peek('"') or self.peek("slice("):
            return self._quoted()
        word = NAME.match(self.text, self.at)
        if word and word.group() in _WORDS:
            self.at = word.end()
            if isinstance(_WORDS[word.group()], torch.device) and self.accept(":"):
                return torch.device(word.group(), int(self.take(re.compile(r"\d+"), "a device's number")))
            return _WORDS[word.group()]
        number = self.take(_NUMBER, "%value, @weight, a number, a list, a dtype, True, False or None")
        try:
            if number.endswith(("j", ")")):
                return complex(number)
            return float(number) if number.lstrip("-") in ("inf", "nan") else ast.literal_eval(number)
        except (ValueError, SyntaxError):
            self.fail(f"'{number}' is no number", start)

    def _quoted(self) -> object:
        if not self.peek("slice("):
            return self._literal()
        start = self.at
        self.expect("slice(")
        parts = [self._value() for _ in self.items(")")]
        if not 1 <= len(parts) <= 3:
            self.fail(f"a slice has one to three numbers, and not {len(parts)}", start)
        return slice(*parts)

    def _list(self) -> list[Any]:
        self.expect("[")
        return [self._value() for _ in self.items("]")]


def _contiguous(shape: Sequence[Size]) -> Sequence[Size]:
    """The strides of a contiguous tensor."""
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _random(name: str, weight_type: TensorType) -> torch.Tensor:
    """A weight with values that depend on its name alone: normal with a variance of 1 / its last size; integers are 0."""
    shape = tuple(map(fixed, weight_type.shape))
    if not weight_type.dtype.is_floating_point:
        return torch.full(shape, weight_type.dtype == torch.bool, dtype=weight_type.dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.randn(shape, generator=generator) / max(1, *shape[-1:], 1) ** 0.5).to(weight_type.dtype)
