"""The one file of the compiler that uses unstable torch internals: fake tensors, symbolic sizes, lazy modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.numbers import int_oo

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.interpreter import call, with_values
from lissom.compiler.ir.operators import RECURRENT_LAYERS
from lissom.compiler.ir.types import ScalarType, Size, TensorType, ValueType, size_of, substitute, type_of

aten = torch.ops.aten

_KNOWN = "lissom_known_calls"
_NEW_SIZES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


class FlatModule(_LazyGraphModule):
    """A graph module that generates its Python code at its first call, so that edits and copies cost nothing."""


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode the graph's fake values belong to; a new one when the graph has no tensors."""
    return next((mode for node in graph.nodes if (mode := mode_of(node)) is not None), None) or FakeTensorMode()


def mode_of(node: fx.Node) -> FakeTensorMode | None:
    """The mode a node's fake tensor belongs to; None when it yields no tensor."""
    value = nodes.value(node) if nodes.has_value(node) else None
    return value.fake_mode if isinstance(value, FakeTensor) else None


@contextmanager
def typing_scope(mode: FakeTensorMode) -> Generator[None]:
    """Run operators on fake values without letting a size become fixed by accident."""
    if mode.shape_env is None:
        with mode, torch.no_grad():
            yield
    else:
        # Some operators, such as baddbmm, take symbolic sizes only in their Python decompositions.
        with mode, mode.shape_env.suppress_guards(), enable_python_dispatcher(), torch.no_grad():
            yield


def fake_call(mode: FakeTensorMode, node: fx.Node) -> object:
    """The fake value of a call node from the fake values of its arguments."""
    with typing_scope(mode):
        if nodes.is_call(node, aten.constant_pad_nd.default, aten.pad.default):
            return _fake_pad(node)
        if nodes.is_call(node, *RECURRENT_LAYERS):
            return _fake_recurrent_layers(*with_values(node.args, nodes.value))
        return call(node, nodes.value)


def assume(condition: object) -> None:
    """Let types rely on the value of a node, a condition that a program asserts. Raises RuntimeError if it is never true."""
    value = nodes.value(condition) if isinstance(condition, fx.Node) else condition
    if isinstance(value, torch.SymBool):
        torch._check(value)


def known_call(mode: FakeTensorMode, node: fx.Node) -> object:
    """The value of `fake_call`, reused from an earlier call with the same operator and argument types: most layers are alike.

    Several nodes may share the value, so it does not tell which tensors share memory.
    """
    known: dict[object, object] = mode.__dict__.setdefault(_KNOWN, {})
    key = _key(node)
    try:
        value = known.get(key, known)
    except TypeError:  # an argument that cannot be hashed
        return fake_call(mode, node)
    if value is known:
        value = fake_call(mode, node)
        # A size that depends on values gets a new name each time.
        if key is not None and not _NEW_SIZES.intersection(getattr(node.target, "tags", ())):
            known[key] = value
    return value


def _key(node: fx.Node) -> object:
    """A key of all that the type of a call depends on; None when it may depend on more."""
    if any(getattr(nodes.value(used), "constant", None) is not None for used in node.all_input_nodes):
        return None
    return node.target, _described(node.args), *((name, _described(argument)) for name, argument in sorted(node.kwargs.items()))


def _described(argument: object) -> object:
    if isinstance(argument, (tuple, list)):
        return tuple(map(_described, argument))
    # The number 1 equals 1.0 and True, which lead to other types.
    return description(nodes.value(argument)) if isinstance(argument, fx.Node) else (type(argument), argument)


def _fake_pad(node: fx.Node) -> object:
    """The fake value of a padding; the operator itself would fix symbolic sizes at those of the example."""
    if node.target is aten.pad.default and nodes.argument(node, "mode") != "constant":
        return call(node, nodes.value)
    x, pad = with_values(node.args[:2], nodes.value)
    shape = list(x.shape)
    for dim, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        shape[-dim] = shape[-dim] + before + after
    return x.new_empty(shape)


def _fake_recurrent_layers(
    input: torch.Tensor, hx: torch.Tensor | Sequence[torch.Tensor], *rest: object
) -> tuple[torch.Tensor, ...]:
    """The fake values of an LSTM, GRU or RNN, its output and its states; the arguments are those of `aten.lstm.input`."""
    states = [hx] if isinstance(hx, torch.Tensor) else hx
    *_, bidirectional, batch_first = rest
    features = states[0].shape[-1] * (2 if bidirectional else 1)
    first, second = input.shape[:2]
    # Steps lie one behind the other in memory.
    output = (
        input.new_empty((second, first, features)).transpose(0, 1)
        if batch_first
        else input.new_empty((first, second, features))
    )
    return output, *(state.new_empty(state.shape) for state in states)


@contextmanager
def recurrent_layers_whole(targets: Iterable[torch._ops.OpOverload] = RECURRENT_LAYERS) -> Generator[None]:
    """Let PyTorch type an LSTM, GRU or RNN as one call; it would type them step by step, and so fix the number of steps.

    Only in this thread.
    """
    thread, kept = get_ident(), {target: dict(target.py_kernels) for target in targets}

    def typed_here(own: Callable[..., object]) -> Callable[..., object]:
        return lambda *args: (_fake_recurrent_layers if get_ident() == thread else own)(*args)

    try:
        for target, kernels in kept.items():
            target.py_kernels.update({key: typed_here(own) for key, own in kernels.items()})
            target._dispatch_cache.clear()
        yield
    finally:
        for target, kernels in kept.items():
            target.py_kernels.update(kernels)
            target._dispatch_cache.clear()


def fake_weight(mode: FakeTensorMode, weight: torch.Tensor) -> torch.Tensor:
    """A fake tensor with the weight's type; all its sizes are fixed."""
    return mode.from_tensor(weight, static_shapes=True)


def same_type(mode: FakeTensorMode | None, left: ValueType, right: ValueType) -> bool:
    """True when two types are equal for every value of their symbols, as far as can be shown."""
    return _same(left, right, partial(same_size, mode))


def same_at_example(mode: FakeTensorMode, left: ValueType, right: ValueType) -> bool:
    """True when two types are equal at the sizes the program was captured with.

    A size that depends on the values of the inputs gets a new name each time its node is typed; two such sizes count as equal.
    """
    return _same(left, right, partial(_same_size_at_example, mode))


def depends_on_values(mode: FakeTensorMode, value_type: ValueType) -> bool:
    """True for a tensor whose size depends on the values of the inputs, and gets a new name each time it is typed."""
    if not isinstance(value_type, TensorType) or mode.shape_env is None:
        return False
    known = _known_sizes(mode.shape_env)
    return any(
        symbol not in known for size in value_type.shape if isinstance(size, sympy.Basic) for symbol in size.free_symbols
    )


def _same(left: ValueType, right: ValueType, same_size: Callable[[Size | float, Size | float], bool]) -> bool:
    match left, right:
        case TensorType(), TensorType():
            same_kind = (left.dtype, left.device, left.rank) == (right.dtype, right.device, right.rank)
            return same_kind and all(map(same_size, left.shape, right.shape))
        case ScalarType(), ScalarType():
            return left.kind is right.kind and same_size(left.value, right.value)
        case tuple(), tuple():
            return len(left) == len(right) and all(map(partial(_same, same_size=same_size), left, right))
        case _:
            return left is right


def _same_size_at_example(mode: FakeTensorMode, left: Size | float, right: Size | float) -> bool:
    left, right = _at_example(mode, left), _at_example(mode, right)
    if isinstance(left, sympy.Basic) and isinstance(right, sympy.Basic) and left.free_symbols and right.free_symbols:
        return True
    return left == right or same_size(mode, left, right)


def _at_example(mode: FakeTensorMode, size: Size | float) -> Size | float:
    if not isinstance(size, sympy.Basic) or mode.shape_env is None:
        return size
    known = {symbol: value for symbol, value in _known_sizes(mode.shape_env).items() if symbol in size.free_symbols}
    return substitute(size, known)


def same_size(mode: FakeTensorMode | None, left: Size | float, right: Size | float) -> bool:
    """True when two sizes are equal for every value of their symbols, as far as can be shown."""
    if left == right:
        return True
    if mode is None or mode.shape_env is None or not (isinstance(left, sympy.Basic) or isinstance(right, sympy.Basic)):
        return False
    if isinstance(left, Boolean) or isinstance(right, Boolean):
        return False
    difference = sympy.sympify(left) - sympy.sympify(right)
    if mode.shape_env.simplify(difference) == 0 or sympy.simplify(difference) == 0:
        return True
    return difference.has(FloorDiv) and bool(sympy.simplify(difference.replace(FloorDiv, _divided)) == 0)


def _divided(left: sympy.Expr, right: sympy.Expr) -> object:
    """`left // right` as a polynomial of sizes when the division is exact; `FloorDiv` itself does not divide powers."""
    numerator, denominator = sympy.fraction(sympy.cancel(left / right))
    return numerator if denominator == 1 else FloorDiv(left, right)


def description(value: object) -> object:
    """All that the types of results depend on: dtype, device, sizes and strides of tensors, expressions of numbers."""
    if isinstance(value, torch.Tensor):
        strides = tuple(map(size_of, value.stride())) if value.layout is torch.strided else None
        return value.dtype, value.device, tuple(map(size_of, value.shape)), strides
    if isinstance(value, (tuple, list)):
        return tuple(map(description, value))
    return type_of(value)


def hint(size: int | torch.SymInt) -> int:
    """The size at the example the program was captured with; 0 when it depends on the values of the inputs."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 0
    return int(size)


@dataclass(frozen=True)
class SymbolFact:
    """The size of a symbol at the example, and its bounds; None for what is unknown.

    A size that depends on the values of the inputs has no `hint`.
    """

    hint: int | None
    minimum: int | None
    maximum: int | None


def symbol_facts(mode: FakeTensorMode, symbols: Iterable[sympy.Symbol]) -> dict[sympy.Symbol, SymbolFact]:
    """The facts the mode holds on each symbol."""
    env = mode.shape_env
    if env is None:
        return {}
    known, ranges = _known_sizes(env), env.var_to_range
    facts: dict[sympy.Symbol, SymbolFact] = {}
    for symbol in symbols:
        bounds = ranges.get(symbol)
        minimum, maximum = (None, None) if bounds is None else (_bound(bounds.lower), _bound(bounds.upper))
        facts[symbol] = SymbolFact(int(known[symbol]) if symbol in known else None, minimum, maximum)
    return facts


def symbolic_mode(facts: Mapping[sympy.Symbol, SymbolFact], conditions: Iterable[sympy.Basic]) -> FakeTensorMode:
    """A new mode with these symbols and conditions on them."""
    env = ShapeEnv()
    for symbol, fact in facts.items():
        minimum = -int_oo if fact.minimum is None else fact.minimum
        env.constrain_symbol_range(symbol, minimum, int_oo if fact.maximum is None else fact.maximum)
        if fact.hint is not None:
            _known_sizes(env)[symbol] = sympy.Integer(fact.hint)
    # The mode numbers the sizes that depend on values; the next one must not get a name that is in use.
    numbered = (re.fullmatch(r"u(\d+)", symbol.name) for symbol in facts)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True, export=True)
    number_sizes_from(mode, max((int(match[1]) + 1 for match in numbered if match), default=0))
    for condition in conditions:
        env.evaluate_expr(condition)
    return mode


def number_sizes_from(mode: FakeTensorMode, first: int) -> None:
    """Name the next size that depends on values `u` with this number."""
    env = mode.shape_env
    assert env is not None
    # A number, or an `itertools.count` in other releases.
    env.unbacked_symint_counter = type(env.unbacked_symint_counter)(first)


def fake_tensor(mode: FakeTensorMode, tensor_type: TensorType, stride: Sequence[Size]) -> torch.Tensor:
    """A fake tensor of that type."""
    sizes, strides = ([_fake_size(mode, size) for size in given] for given in (tensor_type.shape, stride))
    with typing_scope(mode):
        return torch.empty_strided(sizes, strides, dtype=tensor_type.dtype, device=tensor_type.device)


def spelled(mode: FakeTensorMode, value: object, wanted: ValueType) -> object:
    """The fake value with its sizes written as in an equal type, such as `batch*(sequence + 1)` as `batch*sequence + batch`."""
    match value, wanted:
        case torch.Tensor(), TensorType():
            return fake_tensor(mode, wanted, [size_of(stride) for stride in value.stride()])
        case torch.SymInt() | torch.SymFloat(), ScalarType(kind, sympy.Expr() as number):
            return fake_number(mode, kind, number)
        case tuple() | list(), tuple():
            return type(value)(spelled(mode, *pair) for pair in zip(value, wanted, strict=True))
        case _:
            return value


def _fake_size(mode: FakeTensorMode, size: Size) -> int | torch.SymInt:
    if isinstance(size, int):
        return size
    assert mode.shape_env is not None
    return mode.shape_env.create_symintnode(size, hint=None)


def fake_number(mode: FakeTensorMode, kind: type[float], value: Size | float) -> object:
    """A number computed from sizes: symbolic for an expression, otherwise the number itself."""
    env = mode.shape_env
    if not isinstance(value, sympy.Basic) or env is None:
        return value
    if kind is int:
        return _fake_size(mode, value)
    return env.create_symboolnode(value) if kind is bool else env.create_symfloatnode(value, hint=None)


def _known_sizes(env: ShapeEnv) -> dict[sympy.Symbol, sympy.Integer]:
    """The symbols' sizes at the example; renamed between torch 2.11 and 2.13."""
    return getattr(env, "backed_var_to_val" if hasattr(env, "backed_var_to_val") else "var_to_val")


def _bound(value: object) -> int | None:
    return int(value) if isinstance(value, sympy.Integer) else None
