"""One program for several graphs of Dynamo: sizes are dynamic from the first call on, and equal graphs are recognized.

Dynamo makes the sizes of a first call constants, and makes another graph for a second batch size, for size 1, and for
`torch.inference_mode` after `torch.no_grad`. The backend would compile each anew.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any, NoReturn

import sympy
import torch
from torch import fx
from torch._dynamo import config
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.pgo import FrameStateSizeEntry, auto_dynamic, auto_unset, update_automatic_dynamic
from torch._dynamo.symbolic_convert import InstructionTranslator

from lissom.compiler.ir.types import size_of
from lissom.frontends.dynamo.graphs import Graph, source_name

_OF_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size, bool, int, float)
"""The values that are sizes, or are computed from them."""


_made_dynamic: weakref.WeakKeyDictionary[CodeType, list[tuple[FrameStateSizeEntry, tuple[int, ...]]]] = (
    weakref.WeakKeyDictionary()
)
"""By code object: Dynamo's records of its inputs, which were made dynamic here, with the sizes of the first call."""
_static: weakref.WeakSet[CodeType] = weakref.WeakSet()
"""The code objects that could not be compiled with dynamic sizes."""


def restart_with_dynamic_sizes(graph: Graph) -> None:
    """Let Dynamo trace the code again with dynamic batch and sequence, unless all that may be dynamic is so already.

    Batch is dimension 0 of the inputs, and sequence dimension 1 of those of rank 2 and 3, as in `lissom.compile`. Sizes marked
    static stay static, as do all under `torch.compile(dynamic=False)`, and those of 1, which Dynamo always specializes.

    Raises:
        TensorifyScalarRestartAnalysis: the one restart that Dynamo takes from a backend.
    """
    if not config.automatic_dynamic_shapes or not config.assume_static_by_default:
        return
    translator = InstructionTranslator.current_tx()
    if translator.distributed_state is not None or translator.f_code in _static:
        return
    made: list[tuple[FrameStateSizeEntry, tuple[int, ...]]] = []
    for index, node in enumerate(graph.module.graph.find_nodes(op="placeholder")):
        name = source_name(node)
        if index not in graph.inputs or name.startswith("L['self']"):
            continue
        shape = node.meta["example_value"].shape
        free = [dim for dim in ((0, 1) if len(shape) in (2, 3) else (0,)) if dim < len(shape) and shape[dim] != 1]
        entry = update_automatic_dynamic(translator, name, FrameStateSizeEntry(size=_sizes([], len(shape))))
        if all(entry.is_size_dynamic(dim) for dim in free) or not all(type(size) is int for size in shape):
            continue
        entry = update_automatic_dynamic(translator, name, FrameStateSizeEntry(size=_sizes(free, len(shape))))
        # Dynamo keeps the sizes seen so far for an earlier, static graph; there will be none.
        entry.excluded_sizes = None
        made.append((entry, tuple(shape)))
    if made:
        _made_dynamic.setdefault(translator.f_code, []).extend(made)
        _restart(translator, "dynamic")


def _sizes(free: Sequence[int], rank: int) -> Any:
    """The sizes of a tensor in Dynamo's record: these dimensions are dynamic, and of the others nothing is said."""
    return tuple(auto_dynamic if dim in free else auto_unset for dim in range(rank))


def restart_with_static_sizes() -> None:
    """Let Dynamo trace the code again with the sizes of the call, if they were made dynamic here; for a graph that failed.

    Raises:
        TensorifyScalarRestartAnalysis: if they were made dynamic here.
    """
    translator = InstructionTranslator.current_tx()
    made = _made_dynamic.pop(translator.f_code, None)
    if made is None:
        return
    for entry, sizes in made:
        entry.size, entry.excluded_sizes = sizes, None
    _static.add(translator.f_code)
    _restart(translator, "static")


def forget_sizes() -> None:
    """Forget which code has dynamic sizes; Dynamo forgets them too when it is reset."""
    _made_dynamic.clear()
    _static.clear()


def _restart(translator: InstructionTranslator, sizes: str) -> NoReturn:
    # Dynamo's log of the trace holds for the same sizes alone; graph breaks are found again.
    translator.speculation_log.clear()
    raise TensorifyScalarRestartAnalysis(restart_reason=f"backend 'lissom' compiles with {sizes} sizes")


def computes_the_same(known: Graph, other: Graph) -> bool:
    """True if the other graph is the known one, perhaps with numbers for some of its sizes.

    Every call is compared: its operator, its tensors, its constants, and its sizes as expressions of the inputs' sizes. The
    caller compares the weights.
    """
    if known.numbers or other.numbers:
        return False
    sizes = _matched_sizes(known, other)
    if sizes is None or list(known.weights.values()) != list(other.weights.values()):
        return False
    first, second = _Reader(known, sizes), _Reader(other, {})
    ours, theirs = first.calls(), second.calls()
    return len(ours) == len(theirs) and all(
        _same_target(known, one, other, two) and first.arguments(one) == second.arguments(two)
        for one, two in zip(ours, theirs, strict=True)
    )


def _tensors(graph: Graph) -> list[fx.Node]:
    placeholders = graph.module.graph.find_nodes(op="placeholder")
    return [node for node in placeholders if isinstance(node.meta["example_value"], torch.Tensor)]


def _matched_sizes(known: Graph, other: Graph) -> dict[sympy.Basic, sympy.Basic] | None:
    """The size in the other graph for each symbol of the known one; None if inputs differ, or a symbol has several."""
    ours, theirs = _tensors(known), _tensors(other)
    if list(map(source_name, ours)) != list(map(source_name, theirs)):
        return None
    sizes: dict[sympy.Basic, sympy.Basic] = {}
    for one, two in zip(ours, theirs, strict=True):
        a, b = one.meta["example_value"], two.meta["example_value"]
        if (a.dtype, a.device, a.dim(), type(a)) != (b.dtype, b.device, b.dim(), type(b)):
            return None
        for size, given in zip(map(size_of, a.shape), map(size_of, b.shape), strict=True):
            if isinstance(size, sympy.Symbol):
                if sizes.setdefault(size, sympy.sympify(given)) != sympy.sympify(given):
                    return None
            elif size != given:
                return None
    symbols = [size for size in sizes.values() if not size.is_number]
    return sizes if len(set(symbols)) == len(symbols) else None


class _Reader:
    """The calls of a graph, with positions in place of names, and sizes in another graph's symbols."""

    def __init__(self, graph: Graph, sizes: Mapping[sympy.Basic, sympy.Basic]) -> None:
        self._graph = graph
        self._sizes = sizes
        self._places = {node: index for index, node in enumerate([*_tensors(graph), *self.calls()])}

    def calls(self) -> list[fx.Node]:
        """The nodes that compute no size, in order."""
        nodes = (node for node in self._graph.module.graph.nodes if node.op != "placeholder")
        return [node for node in nodes if not isinstance(node.meta.get("example_value"), _OF_SIZES)]

    def arguments(self, node: fx.Node) -> object:
        return self._plain((node.args, node.kwargs))

    def _plain(self, value: object) -> object:
        """A value that compares equal to that of the same call in another graph."""
        if isinstance(value, fx.Node):
            return ("node", self._places[value]) if value in self._places else self._plain(value.meta["example_value"])
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._number(value.node.expr)
        if isinstance(value, (bool, int, float)):
            return ("nan",) if value != value else self._number(value) if type(value) is int else (type(value), value)
        if isinstance(value, slice):
            return ("slice", *map(self._plain, (value.start, value.stop, value.step)))
        if isinstance(value, Mapping):
            return tuple((key, self._plain(part)) for key, part in value.items())
        if isinstance(value, (tuple, list)):
            return tuple(map(self._plain, value))
        return value

    def _number(self, expression: object) -> tuple[str, sympy.Basic]:
        return "size", sympy.sympify(expression).xreplace(self._sizes)


def _same_target(known: Graph, one: fx.Node, other: Graph, two: fx.Node) -> bool:
    if one.op != two.op:
        return False
    if one.op not in ("get_attr", "call_module"):
        return one.target == two.target
    ours, theirs = (operator.attrgetter(str(node.target))(graph.module) for graph, node in ((known, one), (other, two)))
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        same = (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
        return same and torch.equal(ours, theirs)
    return ours is theirs
