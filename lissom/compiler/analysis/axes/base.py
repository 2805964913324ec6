"""Shared by the axis rules: the axes of arguments, new axes, broadcasting, and pinning with a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from torch import fx

from lissom.compiler.analysis.axes.axis import Axis, pin, unify
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.printer import target_text
from lissom.compiler.ir.types import TensorType, ValueType

Dims = tuple[Axis, ...]
Value = tuple[Axis, ...] | tuple[tuple[Axis, ...], ...]
Known = Mapping[fx.Node, Value]
Rule = Callable[[fx.Node, Known], Value]


def fresh(value_type: ValueType, reason: str | None = None) -> Value:
    """New axes for a type, pinned when a reason is given."""
    if isinstance(value_type, TensorType):
        return tuple(Axis(size, pinned=reason) for size in value_type.shape)
    items = value_type if isinstance(value_type, tuple) else ()
    return tuple(cast(Dims, fresh(part, reason)) for part in items)


def of(argument: object, known: Known) -> Dims:
    """The axes of a tensor argument."""
    return cast(Dims, known[cast(fx.Node, argument)])


def tensors(node: fx.Node, known: Known) -> list[Dims]:
    """The axes of all tensor arguments, in order."""
    return [of(used, known) for used in node.all_input_nodes if nodes.is_tensor(used)]


def unknown(node: fx.Node, known: Known) -> Value:
    """The axes for an operator without a rule: new axes, pinned like those of its arguments."""
    reason = f"no rule for {target_text(node.target)}"
    for dims in tensors(node, known):
        for axis in dims:
            pin(axis, reason)
    return fresh(nodes.node_type(node), reason)


def broadcast(inputs: Sequence[Dims], rank: int, reason: str) -> Dims:
    """Unify dimensions from the last to the first; a size of 1 matches any."""
    axes: list[Axis] = []
    for back in range(1, rank + 1):
        present = [dims[-back] for dims in inputs if len(dims) >= back and dims[-back].size != 1]
        for other in present[1:]:
            unify(present[0], other, f"combined by {reason} with another size")
        axes.insert(0, present[0] if present else Axis(1))
    return tuple(axes)
