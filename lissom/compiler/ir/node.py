"""Typed access to what a node carries: its (fake) value and its origin. Nothing else reads `node.meta`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import fx

from lissom.compiler.ir.operators import STATE_WRITES
from lissom.compiler.ir.types import TensorType, ValueType, type_of

if TYPE_CHECKING:
    from lissom.compiler.ir.placement import Placed

_ORIGIN = "lissom_origin"
_VALUE = "val"
_PLACED = "lissom_placed"
_COST = "lissom_cost"


@dataclass(frozen=True)
class Origin:
    """The source of a node: its module, its line in the model's code, and the passes that changed it.

    Attributes:
        module_path: the module whose forward made it, `encoder.layer.0.attention.self`; empty for the model itself.
        source: file name and line in the model's code, `modeling_bert.py:215`; empty when unknown.
        code: the text of that line.
        passes: the passes that made or changed the node, oldest first.
        replaces: the node's name before a pass put this one in its place; used to line up two programs.
    """

    module_path: str = ""
    source: str = ""
    code: str = ""
    passes: tuple[str, ...] = ()
    replaces: str = ""

    def changed_by(self, pass_name: str) -> Origin:
        return self if pass_name in self.passes else replace(self, passes=(*self.passes, pass_name))


class Deferred:
    """A fake value created on first access; its type is known before.

    Fake values need parts of PyTorch that take a second to import, and a program that only runs needs no fake values.
    """

    def __init__(self, value_type: ValueType, make: Callable[[], object]) -> None:
        self.type = value_type
        self._make = make

    @cached_property
    def value(self) -> object:
        return self._make()


def origin(node: fx.Node) -> Origin:
    """The origin of the node; empty if nothing is recorded."""
    return node.meta.get(_ORIGIN, Origin())


def set_origin(node: fx.Node, value: Origin) -> None:
    """Record where the node came from."""
    node.meta[_ORIGIN] = value


def placed(node: fx.Node) -> Placed | tuple[Placed, ...] | None:
    """The node's placement across ranks; None when no plan gives one."""
    return node.meta.get(_PLACED)


def set_placed(node: fx.Node, value: Placed | tuple[Placed, ...]) -> None:
    """Record the node's placement across ranks."""
    node.meta[_PLACED] = value


def kept_cost(node: fx.Node) -> tuple[Sequence[object], object] | None:
    """The cost kept for the node, after the values it was computed from; None before the first."""
    return node.meta.get(_COST)


def keep_cost(node: fx.Node, values: Sequence[object], cost: object) -> None:
    """Keep a cost on the node, with the (fake) values it was computed from; copies of the program have it too."""
    node.meta[_COST] = (values, cost)


def has_value(node: fx.Node) -> bool:
    """True once the node is typed."""
    return _VALUE in node.meta


def value(node: fx.Node) -> object:
    """The fake value the node was typed with: fake tensor, symbolic or plain number, or a tuple of these."""
    stored = node.meta[_VALUE]
    return stored.value if isinstance(stored, Deferred) else stored


def tensor_value(node: fx.Node) -> torch.Tensor:
    """The fake tensor the node was typed with.

    Raises:
        TypeError: when the node yields something else.
    """
    tensor = value(node)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{node} yields {tensor}, not a tensor")
    return tensor


def set_value(node: fx.Node, fake: object) -> None:
    """Type the node with a fake value, or one to be made later."""
    node.meta[_VALUE] = fake


def node_type(node: fx.Node) -> ValueType:
    """The type of the node's value."""
    stored = node.meta[_VALUE]
    return stored.type if isinstance(stored, Deferred) else type_of(stored)


def tensor_type(node: object) -> TensorType:
    """The node's type, which must be a tensor.

    Raises:
        TypeError: when the node yields something else.
    """
    value_type = node_type(node) if isinstance(node, fx.Node) else node
    if not isinstance(value_type, TensorType):
        raise TypeError(f"{node} yields {value_type}, not a tensor")
    return value_type


def is_tensor(node: object) -> TypeGuard[fx.Node]:
    """True when `node` is a node of a program that yields one tensor."""
    if not isinstance(node, fx.Node) or not has_value(node):
        return False
    stored = node.meta[_VALUE]
    return isinstance(stored, torch.Tensor) or (isinstance(stored, Deferred) and isinstance(stored.type, TensorType))


def is_call(node: object, *targets: object) -> TypeGuard[fx.Node]:
    """True when `node` calls one of the targets."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def operand(node: fx.Node, index: int = 0) -> fx.Node:
    """The value that a call reads at a place of its positional arguments.

    Raises:
        TypeError: where the call has a number or nothing there.
    """
    argument = node.args[index] if index < len(node.args) else None
    if not isinstance(argument, fx.Node):
        raise TypeError(f"{node.format_node()} reads no value at {index}")
    return argument


def leaves(output: fx.Node) -> Sequence[object]:
    """The flat values that a graph's output node returns: nodes, and numbers."""
    values = output.args[0]
    assert isinstance(values, (tuple, list))
    return values


def fixed_size(node: object, dim: int) -> int:
    """The size of a dimension of a node's tensor that is the same in every call.

    Raises:
        TypeError: where it varies, or where the node yields no tensor.
    """
    size = tensor_type(node).shape[dim]
    if not isinstance(size, int):
        raise TypeError(f"dimension {dim} of {node} varies from call to call: {size}")
    return size


def overload(node: fx.Node) -> torch._ops.OpOverload:
    """The operator a node calls.

    Raises:
        TypeError: where it calls another function.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        raise TypeError(f"{node.format_node()} calls no operator")
    return node.target


@cache
def _parameters(target: torch._ops.OpOverload) -> Mapping[str, tuple[int, object]]:
    """The parameters of an operator by name: its place among positional arguments, -1 for none, and its default."""
    parameters = target._schema.arguments
    return {
        parameter.name: (-1 if parameter.kwarg_only else index, parameter.default_value)
        for index, parameter in enumerate(parameters)
    }


def argument(node: fx.Node, *names: str) -> object:
    """The argument the call gives for the operator's parameter of one of these names, or the schema's default.

    Raises:
        KeyError: when the operator has no such parameter.
    """
    parameters = _parameters(overload(node))
    name = next((name for name in names if name in parameters), None)
    if name is None:
        raise KeyError(f"{node.target} has no parameter '{' or '.join(names)}'")
    place, default = parameters[name]
    return node.args[place] if 0 <= place < len(node.args) else node.kwargs.get(name, default)


def set_argument(node: fx.Node, name: str, value: object) -> None:
    """Set the argument of a call for the operator's parameter `name`, wherever the call has it."""
    index = [parameter.name for parameter in overload(node)._schema.arguments].index(name)
    if index < len(node.args):
        set_arguments(node, *node.args[:index], value, *node.args[index + 1 :], **node.kwargs)
    else:
        set_arguments(node, *node.args, **{**node.kwargs, name: value})


def set_arguments(node: fx.Node, /, *args: object, **kwargs: object) -> None:
    """Set all arguments of a node."""
    given: tuple[Any, Any] = (args, kwargs)
    node.args, node.kwargs = given


def set_operand(node: fx.Node, index: int, value: object) -> None:
    """Set what a call reads at a place of its positional arguments."""
    set_arguments(node, *node.args[:index], value, *node.args[index + 1 :], **node.kwargs)


def is_state_write(node: fx.Node) -> bool:
    """True for the mutations a program may hold: `copy_` into a weight listed as state, or into rows of it."""
    first = node.args[0] if node.args else None
    return is_call(node, *STATE_WRITES) and isinstance(first, fx.Node) and first.op == "get_attr"


def is_pure(node: fx.Node) -> bool:
    """True when calling the node twice with equal arguments gives equal results and changes nothing."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    tags = node.target.tags
    return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in tags


def merged_origin(nodes: Iterable[fx.Node]) -> Origin:
    """The origin of a node that stands for several: the longest module path they share, the last one's source line."""
    origins = [origin(node) for node in nodes]
    if not origins:
        return Origin()
    paths = [part_origin.module_path.split(".") for part_origin in origins]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return replace(origins[-1], module_path=".".join(shared), replaces="")
