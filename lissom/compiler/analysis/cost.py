"""The cost of a program: operations, bytes moved and parameters of every node and site, for given or symbolic sizes.

A node reads each of its inputs once and writes its outputs once, without any caching. Views move nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from lissom.compiler.analysis.flops import operations
from lissom.compiler.analysis.sites import Site
from lissom.compiler.analysis.sites import sites as find_sites
from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.match import is_view
from lissom.compiler.ir.operators import DROPOUTS, LOOKUPS
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import Size, are_fixed, product, size_of, substitute
from lissom.compiler.ir.view_calls import IndexCopy
from lissom.errors import UnsupportedError, nearest

aten = torch.ops.aten

ReadSize = Callable[["int | torch.SymInt"], Size]


_ANSWERS: WeakKeyDictionary[FakeTensorMode, dict[object, bool]] = WeakKeyDictionary()
"""A cache of `moves_nothing`, kept as long as the fake tensors."""


@dataclass(frozen=True)
class Cost:
    """The cost of one or more nodes. Each value is a number, or an expression of the program's dimensions.

    Attributes:
        flops: operations of products, convolutions and attentions; see `lissom.compiler.analysis.flops`.
        read_bytes: of all inputs, weights among them.
        written_bytes: of all outputs.
        parameters: elements of the weights and buffers read, a weight read twice counted once.
    """

    flops: Size = 0
    read_bytes: Size = 0
    written_bytes: Size = 0
    parameters: int = 0

    @property
    def bytes(self) -> Size:
        return self.read_bytes + self.written_bytes

    @property
    def intensity(self) -> sympy.Expr | float:
        """Arithmetic intensity: operations per byte moved; 0 when nothing is moved."""
        if self.bytes == 0:
            return 0.0
        return self.flops / self.bytes

    @property
    def symbols(self) -> set[sympy.Symbol]:
        """The sizes it depends on: symbolic dimensions, and sizes that depend on the values of the inputs."""
        values = (self.flops, self.read_bytes, self.written_bytes)
        free = (symbol for value in values if isinstance(value, sympy.Expr) for symbol in value.free_symbols)
        return {symbol for symbol in free if isinstance(symbol, sympy.Symbol)}

    def at(self, sizes: Mapping[sympy.Symbol, int]) -> Cost:
        """The cost with these symbols replaced by numbers."""
        replaced = (_replace(value, sizes) for value in (self.flops, self.read_bytes, self.written_bytes))
        return Cost(*replaced, parameters=self.parameters)


def flops(program: Program) -> int:
    """Operations of the whole program at the sizes it was captured with.

    A size that depends on values counts as its largest possible value when it comes from `nonzero`, and else as 0.
    """
    largest: dict[sympy.Basic, sympy.Integer] = {}
    for node in program.nodes(aten.nonzero.default):
        elements = int(product(example_shape(nodes.operand(node))))
        largest |= {symbol: sympy.Integer(elements) for symbol in _shape(node)[:1] if isinstance(symbol, sympy.Symbol)}
    if not largest:
        return sum(map(node_flops, program.nodes()))
    return sum(int(operations(node, partial(_largest_shape, largest))) for node in program.nodes())


def node_flops(node: fx.Node) -> int:
    """Operations of one node at the sizes it was captured with; 0 for operators without a formula."""
    return int(operations(node, example_shape))


def node_cost(node: fx.Node, read_size: ReadSize = size_of) -> Cost:
    """The cost of one node, as numbers when its sizes are numbers. Views, sizes, inputs and weights themselves cost nothing.

    Of an embedding table only the looked-up rows are read; an expanded dimension is read once.

    Args:
        read_size: gives a size as a number or an expression; `fake.hint` gives that of the example.
    """
    value = nodes.value(node) if node.op == "call_function" else None
    if not isinstance(value, (torch.Tensor, tuple, list)) or moves_nothing(node):
        return Cost()
    written = _bytes(IndexCopy(node).source if node.target is aten.index_copy_.default else node, read_size)
    flops = operations(node, example_shape if read_size is fake.hint else _shape)
    return Cost(flops, _read_bytes(node, written, read_size), written, sum(_weights_of(node).values()))


def example_cost(node: fx.Node) -> Cost:
    """The cost of one node as numbers, at the sizes the program was captured with; sizes that depend on values count as 0.

    It is kept on the node, and computed anew once the node or one of its inputs has another type.
    """
    values = [nodes.value(used) for used in (node, *node.all_input_nodes) if nodes.has_value(used)]
    kept = nodes.kept_cost(node)
    if kept is not None and len(kept[0]) == len(values) and all(map(operator.is_, kept[0], values)):
        cost = kept[1]
        assert isinstance(cost, Cost)
        return cost
    cost = node_cost(node, fake.hint)
    nodes.keep_cost(node, values, cost)
    return cost


def cost(program: Program, sizes: Mapping[str, int] | None = None) -> Mapping[fx.Node, Cost]:
    """The cost of every call of a program.

    Args:
        sizes: numbers for dimensions by name, `{"batch": 8, "sequence": 128}`; those left out stay symbolic.

    Raises:
        UnsupportedError: for a name the program does not have, or a size it does not take.

    Examples:
        >>> import torch, lissom
        >>> from lissom.compiler.analysis.cost import cost
        >>> program = lissom.compile(torch.nn.Linear(4, 8), torch.randn(2, 4)).program
        >>> (node,) = program.nodes()
        >>> program.signature.name_of(cost(program)[node].flops), cost(program, {"batch": 3})[node].flops
        ('64*batch', 192)
    """
    numbers = size_numbers(program, sizes or {})
    return {node: symbolic.at(numbers) for node, symbolic in program.fact(_symbolic_costs).items()}


def costs_on(program: Program, tensors: Sequence[torch.Tensor]) -> tuple[dict[str, int], dict[fx.Node, Cost]]:
    """The sizes of these inputs' dimensions by name, and the cost of every call at them.

    Sizes that depend on values count as 0.

    Raises:
        UnsupportedError: for inputs of sizes the program does not take.
    """
    dimensions = program.signature.dimensions
    symbol_sizes = program.signature.sizes_of(tensors)
    sizes = {dimensions[symbol].name: size for symbol, size in symbol_sizes.items() if symbol in dimensions}
    costs = cost(program, sizes)
    zeros = {symbol: 0 for symbolic in costs.values() for symbol in symbolic.symbols}
    return sizes, {node: symbolic.at(zeros) for node, symbolic in costs.items()}


def total_cost(program: Program, sizes: Mapping[str, int] | None = None) -> Cost:
    """The cost of the whole program; `sizes` as in `cost`, and the same errors."""
    return _total(cost(program, sizes), program.nodes())


def site_costs(program: Program, sizes: Mapping[str, int] | None = None) -> Mapping[Site, Cost]:
    """The cost of every site, in the order `lissom.compiler.analysis.sites` gives. `sizes` as in `cost`, and the same errors.

    Operations and bytes add up to those of the program; parameters need not, because sites may share a weight.
    """
    costs = cost(program, sizes)
    return {site: _total(costs, site.nodes) for site in program.fact(find_sites)}


def example_sizes(program: Program) -> dict[str, int]:
    """The size of each dimension in the example the program was captured with, by name."""
    sizes: dict[str, int] = {}
    for node in program.placeholders:
        for size in getattr(nodes.value(node), "shape", ()):
            dimension = program.signature.dimensions.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if dimension is not None:
                sizes[dimension.name] = fake.hint(size)
    return sizes


def moves_nothing(node: fx.Node) -> bool:
    """True when the result shares memory with the first argument: a view, or a reshape or cast without effect."""
    if not is_view(node):
        return False
    source, mode = nodes.operand(node), fake.mode_of(node)
    if not nodes.is_tensor(source) or not nodes.is_tensor(node) or mode is None:
        return True
    if node.target in DROPOUTS or _memory(nodes.value(node)) == _memory(nodes.value(source)):
        return True
    # Capture types some views with memory of their own; calling the operator again tells them from copies. Layers are alike, so
    # few calls are needed.
    known = _ANSWERS.setdefault(mode, {})
    key = (node.target, _layout(source), _layout(node), str(node.kwargs))
    if key not in known:
        known[key] = _memory(fake.fake_call(mode, node)) == _memory(nodes.value(source))
    return known[key]


def _layout(node: fx.Node) -> object:
    """Type and strides of a node's tensor."""
    value = nodes.tensor_value(node)
    return value.dtype, tuple(map(str, value.shape)), tuple(map(str, value.stride()))


def _memory(value: object) -> int:
    """An id of a fake tensor's storage, valid while the tensor lives."""
    assert isinstance(value, torch.Tensor)
    return value.untyped_storage()._cdata


def _read_bytes(node: fx.Node, written: Size, read_size: ReadSize) -> Size:
    inputs = [operand for operand in node.all_input_nodes if nodes.is_tensor(operand)]
    if node.target in LOOKUPS:
        return _sum([written, *(_bytes(operand, read_size) for operand in inputs if operand is not nodes.operand(node))])
    name = getattr(node.target, "__name__", "")
    if name.partition(".")[0].endswith("_like") or name.startswith("new_"):
        # `zeros_like`, `new_full`: only the sizes of the argument are read.
        return 0
    skipped = nodes.operand(node) if nodes.is_state_write(node) else None
    return _sum(_bytes(operand, read_size) for operand in inputs if operand is not skipped)


def _bytes(node: fx.Node, read_size: ReadSize) -> Size:
    """Bytes of a node's tensors; an expanded dimension is stored once."""
    value, total = nodes.value(node), list[Size]()
    for tensor in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(tensor, torch.Tensor):
            strides = tensor.stride() if tensor.layout is torch.strided else (1,) * tensor.dim()
            sizes = [read_size(size) for size, stride in zip(tensor.shape, strides, strict=True) if size_of(stride) != 0]
            total.append(product(sizes) * tensor.element_size())
    return _sum(total)


def _shape(node: fx.Node) -> tuple[Size, ...]:
    return nodes.tensor_type(node).shape


def example_shape(node: fx.Node) -> tuple[int, ...]:
    """The sizes of a node's tensor in the example the program was captured with."""
    return tuple(fake.hint(size) for size in nodes.tensor_value(node).shape)


def _largest_shape(largest: Mapping[sympy.Basic, sympy.Integer], node: fx.Node) -> tuple[int, ...]:
    """The sizes at the example, with `largest` for the sizes that depend on values."""
    shape = zip(nodes.tensor_value(node).shape, _shape(node), strict=True)
    known = (
        (size, symbolic.xreplace(largest)) if isinstance(symbolic, sympy.Basic) else (size, symbolic)
        for size, symbolic in shape
    )
    return tuple(
        known_size if isinstance(known_size, int) else int(str(known_size)) if known_size.is_number else fake.hint(size)
        for size, known_size in known
    )


def _weights_of(node: fx.Node) -> dict[str, int]:
    """The elements of the weights a node reads, whole or as a view, by name."""
    counts: dict[str, int] = {}
    for operand in node.all_input_nodes:
        views = [operand]
        while is_view(views[-1]):
            views.append(nodes.operand(views[-1]))
        root = views.pop()
        if root.op == "get_attr" and all(map(moves_nothing, views)):
            counts[str(root.target)] = int(product(_shape(root)))
    return counts


def _symbolic_costs(program: Program) -> dict[fx.Node, Cost]:
    return {node: node_cost(node) for node in program.nodes()}


def _total(costs: Mapping[fx.Node, Cost], members: Sequence[fx.Node]) -> Cost:
    parts = [costs[node] for node in members]
    weights = {name: count for node in members if costs[node].parameters for name, count in _weights_of(node).items()}
    return Cost(
        flops=_sum(part.flops for part in parts),
        read_bytes=_sum(part.read_bytes for part in parts),
        written_bytes=_sum(part.written_bytes for part in parts),
        parameters=sum(weights.values()),
    )


def _sum(sizes: Iterable[Size]) -> Size:
    terms = list(sizes)
    return sum(terms) if are_fixed(terms) else sympy.Add(*terms)


def _replace(value: Size, numbers: Mapping[sympy.Symbol, int]) -> Size:
    if isinstance(value, int) or not numbers:
        return value
    replaced = substitute(value, {symbol: sympy.Integer(number) for symbol, number in numbers.items()})
    return int(str(replaced)) if replaced.is_Integer else replaced


def size_numbers(program: Program, sizes: Mapping[str, int]) -> dict[sympy.Symbol, int]:
    """The sizes by symbol, each checked against the signature."""
    signature, numbers = program.signature, dict[sympy.Symbol, int]()
    symbols = {dimension.name: symbol for symbol, dimension in signature.dimensions.items()}
    listed = ", ".join(f"{dimension.name} ({dimension.range})" for dimension in signature.dimensions.values())
    for name, number in sizes.items():
        if name not in symbols:
            have = f"it has {listed}" if listed else "all its sizes are fixed"
            raise UnsupportedError(f"{program.name} has no dimension '{name}'{nearest(name, symbols) or ';'} {have}")
        dimension = signature.dimensions[symbols[name]]
        if not dimension.allows(number):
            raise UnsupportedError(f"{name} = {number} is no size {program.name} takes; allowed: {dimension.range}")
        numbers[symbols[name]] = number
    for condition in signature.conditions:
        if condition.xreplace({symbol: sympy.Integer(number) for symbol, number in numbers.items()}) == sympy.false:
            given = ", ".join(f"{name} = {number}" for name, number in sizes.items())
            raise UnsupportedError(
                f"{given} breaks a condition of {program.name}, {signature.name_of(condition)}; give sizes that meet it"
            )
    return numbers
