"""The one file of the compiler that touches torch internals that drift: fake tensors, symbolic sizes, lazy modules."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import cast

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule

from lissom.compiler import node as nodes
from lissom.compiler.execute import call
from lissom.compiler.types import ScalarType, Size, TensorType, ValueType


class FlatModule(_LazyGraphModule):
    """A graph module that generates its Python code at its first call, so that edits and copies cost nothing."""


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode the graph's fake values belong to; a new one when the graph has no tensors."""
    return next((found for node in graph.nodes if (found := mode_of(node)) is not None), None) or FakeTensorMode()


def mode_of(node: fx.Node) -> FakeTensorMode | None:
    """The mode a node's fake tensor belongs to; None when it yields no tensor."""
    found = nodes.value(node) if nodes.has_value(node) else None
    return found.fake_mode if isinstance(found, FakeTensor) else None


@contextmanager
def typing_scope(mode: FakeTensorMode) -> Generator[None]:
    """Run operators on fake values without letting a size become fixed by accident."""
    if mode.shape_env is None:
        with mode, torch.no_grad():
            yield
    else:
        with mode, mode.shape_env.suppress_guards(), torch.no_grad():
            yield


def fake_call(mode: FakeTensorMode, node: fx.Node) -> object:
    """The fake value of a call node from the fake values of its arguments."""
    with typing_scope(mode):
        return call(node, nodes.value)


def fake_weight(mode: FakeTensorMode, weight: torch.Tensor) -> torch.Tensor:
    """A fake tensor with the weight's type; all its sizes are fixed."""
    return mode.from_tensor(weight, static_shapes=True)


def same_type(mode: FakeTensorMode | None, left: ValueType, right: ValueType) -> bool:
    """True when two types are equal for every value of their symbols, as far as can be shown."""
    return _same(left, right, partial(_same_size, mode))


def same_at_example(mode: FakeTensorMode, left: ValueType, right: ValueType) -> bool:
    """True when two types are equal at the sizes the program was captured with.

    A size that depends on the values of the inputs gets a new name each time its node is typed; two such sizes count as equal.
    """
    return _same(left, right, partial(_same_size_at_example, mode))


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
    return left == right or _same_size(mode, left, right)


def _at_example(mode: FakeTensorMode, size: Size | float) -> Size | float:
    if not isinstance(size, sympy.Basic) or mode.shape_env is None:
        return size
    # Renamed between torch 2.11 and 2.13.
    values = getattr(mode.shape_env, "backed_var_to_val", None) or getattr(mode.shape_env, "var_to_val")  # noqa: B009
    known = {symbol: value for symbol, value in values.items() if symbol in size.free_symbols}
    return cast(Size, size.xreplace(known))


def _same_size(mode: FakeTensorMode | None, left: Size | float, right: Size | float) -> bool:
    if left == right:
        return True
    if mode is None or mode.shape_env is None or not (isinstance(left, sympy.Basic) or isinstance(right, sympy.Basic)):
        return False
    difference = sympy.sympify(left) - sympy.sympify(right)
    return bool(mode.shape_env.simplify(difference) == 0 or sympy.simplify(difference) == 0)


def hint(size: object) -> int:
    """The size at the example the program was captured with; 0 when it depends on the values of the inputs."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 0
    return int(size)  # pyright: ignore[reportArgumentType]
