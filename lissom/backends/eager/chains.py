"""Chains: runs of operators that the library of kernels calls one after the other, without Python between them.

A call through Python and PyTorch's dispatcher takes several microseconds, which is more than the computation where a model is
small or reads one token. `lissom::make_chain` takes the calls as numbers: for each its operator, the registers of its
results, its arguments, and the registers that no later call reads (`ops/native/chain.h`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import chain
from operator import getitem
from typing import Any

import torch
from torch import fx

from lissom.compiler.ir.node import has_value, is_tensor, node_type, overload
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import ScalarType, TensorType, ValueType
from lissom.compiler.ir.view_calls import Item
from lissom.ops.native import load_kernels

aten = torch.ops.aten

FEWEST = 4
"""Fewer calls are made from Python: a chain takes a few microseconds itself."""


@dataclass(frozen=True)
class Run:
    """Calls in order, with no other call between them.

    Attributes:
        native: by a chain, and not from Python.
        outputs: the values that are read later.
        freed: the values that nothing reads later; for a chain, of those it is given and those it returns.
    """

    nodes: Sequence[fx.Node]
    native: bool
    outputs: Sequence[fx.Node] = ()
    freed: Sequence[fx.Node] = ()

    @cached_property
    def read(self) -> list[fx.Node]:
        """The values that are read and made before, without weights."""
        inside = set(self.nodes)
        reads = dict.fromkeys(chain.from_iterable(node.all_input_nodes for node in self.nodes))
        return [node for node in reads if node not in inside and node.op != "get_attr"]

    @property
    def tensors(self) -> list[fx.Node]:
        """The tensors that a chain is given in each call."""
        return [node for node in self.read if _is_tensor(node)]

    @property
    def numbers(self) -> list[fx.Node]:
        """The numbers that a chain is given in each call."""
        return [node for node in self.read if not _is_tensor(node)]


def runs_of(program: Program, is_replaced: Callable[[fx.Node], bool]) -> list[Run]:
    """All calls of the program, in an order in which they can be run.

    Another call that no chain can make goes before the chain that is open, unless it reads its results, or memory that it
    writes. A replaced one does not: ranks that wait for each other in it make the same calls before.

    Args:
        is_replaced: nodes that Python calls.
    """
    operators = _operators() if _on_cpu(program) else frozenset[str]()
    state = _reached(program, program.state)
    runs, opened, writing = list[Run](), list[fx.Node](), list[fx.Node]()
    inside, done = set[fx.Node](), set[fx.Node]()

    def close() -> None:
        if sum(node.target is not getitem for node in opened) >= FEWEST:
            runs.append(Run(tuple(opened), native=True))
        else:
            runs.extend(Run((node,), native=False) for node in opened)
        for held in (opened, inside, writing):
            held.clear()

    for node in program.nodes():
        if node in done:
            continue
        replaced = is_replaced(node)
        if not replaced and _is_native(node, operators):
            calls = [node, *node.users] if _pieces(node) else [node]
            opened.extend(calls)
            inside.update(calls)
            done.update(calls)
            writing.extend(filter(_writes, calls))
            continue
        written = _writes(node) or (node in state and bool(writing))
        if opened and (replaced or written or not inside.isdisjoint(node.all_input_nodes)):
            close()
        runs.append(Run((node,), native=False))
    close()
    return _with_lifetimes(runs, program.graph)


def _with_lifetimes(runs: Sequence[Run], graph: fx.Graph) -> list[Run]:
    """The runs with their outputs, and with the values that are freed after each."""
    later, complete = set(graph.output_node().all_input_nodes), list[Run]()
    for run in reversed(runs):
        outputs = [node for node in run.nodes if not run.native or node in later]
        freed = [node for node in dict.fromkeys([*outputs, *run.read]) if node not in later]
        later.update(run.read)
        complete.append(Run(run.nodes, run.native, outputs, freed))
    return complete[::-1]


class Chain:
    """A chain of the library, freed with this object. Called with the tensors and numbers it reads; returns its outputs."""

    def __init__(self, run: Run, weight: Callable[[str], torch.Tensor]) -> None:
        encoder = _Encoder(weight, {node: place for place, node in enumerate(run.tensors)}, run.numbers)
        inputs, last = len(encoder.registers), _last_reads(run)
        for node in run.nodes:
            if node.target is not getitem:
                encoder.append(node, last.get(node, ()))
        self._chain: torch.Tensor = torch.ops.lissom.make_chain(
            list(encoder.operators), encoder.code, encoder.floats, encoder.texts, encoder.constants,
            inputs, len(encoder.numbers), encoder.count, [encoder.registers[node] for node in run.outputs],
        )  # fmt: skip
        self._run = torch.ops.lissom.run_chain.default

    def __call__(self, tensors: list[torch.Tensor], numbers: list[int]) -> list[torch.Tensor]:
        return self._run(self._chain, tensors, numbers)


def _last_reads(run: Run) -> dict[fx.Node, list[fx.Node]]:
    """The values that each call of a chain is the last to read, and the results that nothing reads."""
    last: dict[fx.Node, fx.Node] = {}
    for node in run.nodes:
        if node.target is getitem:
            last[node] = node.all_input_nodes[0]
        else:
            last |= dict.fromkeys((node, *node.all_input_nodes), node)
    last_reads: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last.items():
        if value not in run.outputs:
            last_reads.setdefault(node, []).append(value)
    return last_reads


@dataclass
class _Encoder:
    """Writes calls as numbers; kinds are those of `Kind` in chain.h."""

    weight: Callable[[str], torch.Tensor]
    registers: dict[fx.Node, int]
    given: Sequence[fx.Node]
    operators: dict[str, int] = field(default_factory=dict[str, int])
    code: list[int] = field(default_factory=list[int])
    floats: list[float] = field(default_factory=list[float])
    texts: list[str] = field(default_factory=list[str])
    constants: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    places: dict[str, int] = field(default_factory=dict[str, int])
    """Of constants, by name."""

    def __post_init__(self) -> None:
        self.numbers = {node: place for place, node in enumerate(self.given)}
        self.count = len(self.registers)

    def append(self, node: fx.Node, freed: Iterable[fx.Node]) -> None:
        arguments = _arguments(node)
        assert arguments is not None, "a call that no chain can make"
        name, pieces = overload(node).name(), _pieces(node)
        self.code += [self.operators.setdefault(name, len(self.operators)), self.count, pieces or 1, len(arguments)]
        for argument in arguments:
            self._argument(argument)
        if pieces:
            self.registers |= {piece: self.count + Item(piece).index for piece in node.users}
        else:
            self.registers[node] = self.count
        self.count += pieces or 1
        places = [self.registers[value] for value in freed if value in self.registers]
        self.code += [len(places), *places]

    def _argument(self, argument: Any) -> None:
        if argument is None:
            self.code.append(0)
        elif isinstance(argument, fx.Node) and argument.op == "get_attr":
            name = str(argument.target)
            if name not in self.places:
                self.places[name] = len(self.constants)
                self.constants.append(self.weight(name))
            self.code += [2, self.places[name]]
        elif isinstance(argument, fx.Node):
            self.code += [1, self.registers[argument]] if _is_tensor(argument) else [3, self.numbers[argument]]
        elif isinstance(argument, bool):
            self.code += [5, int(argument)]
        elif isinstance(argument, int):
            self.code += [4, argument]
        elif isinstance(argument, float):
            self.code += [6, len(self.floats)]
            self.floats.append(argument)
        elif isinstance(argument, str):
            self.code += [7, len(self.texts)]
            self.texts.append(argument)
        else:
            self.code += [8, len(argument)]
            for part in argument:
                self._argument(part)


@cache
def _operators() -> frozenset[str]:
    """The operators that a chain can call, none without the library of kernels."""
    return frozenset[str]() if load_kernels() else frozenset(torch.ops.lissom.chain_operators())


def _on_cpu(program: Program) -> bool:
    inputs = (leaf.type.device for leaf in program.signature.tensors)
    return all(device.type == "cpu" for device in (*inputs, *(weight.device for weight in program.weights().values())))


def _reached(program: Program, state: Iterable[str]) -> set[fx.Node]:
    """The nodes that the program's state reaches."""
    names, reached = set(state), set[fx.Node]()
    if names:
        for node in program.graph.nodes:
            if (node.op == "get_attr" and str(node.target) in names) or not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
    return reached


def _is_native(node: fx.Node, operators: frozenset[str]) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.name() not in operators or _arguments(node) is None:
        return False
    if node.target is aten.add.Tensor:
        return _adds_floats(node)
    return not _pieces(node) or all(map(_is_piece, node.users))


def _adds_floats(node: fx.Node) -> bool:
    """True for a sum of two tensors of one dtype, float32 or bfloat16, one of which has the sizes of the sum."""
    types = [_type(operand) for operand in (node, *node.args) if isinstance(operand, fx.Node)]
    tensors = [value_type for value_type in types if isinstance(value_type, TensorType)]
    if node.kwargs or len(tensors) != 3:
        return False
    floats = {tensor.dtype for tensor in tensors} in ({torch.float32}, {torch.bfloat16})
    return floats and tensors[0].shape in [tensor.shape for tensor in tensors[1:]]


def _is_piece(node: fx.Node) -> bool:
    if node.target is not getitem or len(node.args) != 2:
        return False
    whole, place = node.args
    return isinstance(whole, fx.Node) and isinstance(place, int) and 0 <= place < _pieces(whole)


def _type(node: fx.Node) -> ValueType:
    """The node's type, known before its value is made; None where it has none."""
    return node_type(node) if has_value(node) else None


def _pieces(node: fx.Node) -> int:
    """The number of results of a call that returns several; 0 for others."""
    value_type = _type(node)
    return len(value_type) if isinstance(value_type, tuple) else 0


def _is_tensor(node: fx.Node) -> bool:
    return node.op == "get_attr" or is_tensor(node)


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _arguments(node: fx.Node) -> list[Any] | None:
    """The arguments in the order of the operator's schema, with defaults; None where one is neither a tensor nor a literal."""
    rest = overload(node)._schema.arguments[len(node.args) :]
    arguments = [*node.args, *(node.kwargs.get(parameter.name, parameter.default_value) for parameter in rest)]
    named = node.kwargs.keys() <= {parameter.name for parameter in rest}
    return arguments if named and all(map(_is_argument, arguments)) else None


def _is_argument(argument: object) -> bool:
    if isinstance(argument, fx.Node):
        value_type = _type(argument)
        if isinstance(value_type, TensorType):
            return not value_type.dtype.is_complex  # which may be conjugated by a flag
        return _is_tensor(argument) or (isinstance(value_type, ScalarType) and value_type.kind is int)
    if isinstance(argument, (list, tuple)):
        return all(isinstance(part, int) or (isinstance(part, fx.Node) and not _is_tensor(part)) for part in argument)
    return argument is None or isinstance(argument, (bool, int, float, str))
