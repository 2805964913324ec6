"""The calls of ATen operators that a sample input makes, each as a program whose arguments are weights."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import UNFILLED
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.signature import Signature


@dataclass(frozen=True)
class Call:
    """One call of an operator: its target, and its arguments with real tensors."""

    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Equal for calls that differ in the values of tensors only."""
        return f"{self.target} {pytree.tree_map(_described, (self.args, dict(self.kwargs)))}"

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensor arguments, each once, in order."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())

    def __str__(self) -> str:
        shown = [str(pytree.tree_map(_described, value)) for value in self.args]
        shown += [f"{name}={pytree.tree_map(_described, value)}" for name, value in self.kwargs.items()]
        return f"{self.target}({', '.join(shown)})"


def _described(value: object) -> object:
    """A tensor's dtype, sizes and strides in place of its values."""
    if not isinstance(value, torch.Tensor):
        return value
    dense = "" if value.is_contiguous() else f" strides {list(value.stride())}"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{dense}"


def calls_of(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Call]:
    """The calls of `function(*args, **kwargs)`, traced before dispatch as capture does; only those with tensors and results.

    Calls with random or undefined results, and those that change an argument, are left out.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def called(*tensors: torch.Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        given, named = pytree.tree_unflatten(filled, spec)
        return function(*given, **named)

    tensors = [leaves[place].detach() for place in places]
    traced = make_fx(called, pre_dispatch=True)(*tensors)
    calls: list[Call] = []

    class Recorder(fx.Interpreter):
        def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if _is_wanted(target):
                calls.append(Call(target, args, kwargs))
            return super().call_function(target, args, kwargs)

    Recorder(traced).run(*tensors)
    yield from (call for call in calls if call.tensors and all(map(_is_plain, call.tensors)))


def _is_wanted(target: object) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or target in UNFILLED:
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_conj() and not tensor.is_neg()


@dataclass(frozen=True)
class OneCall:
    """A program of one call. call: its node. results: the node, or one node for each of its several results."""

    program: Program
    call: fx.Node
    results: tuple[fx.Node, ...]

    @property
    def weights(self) -> list[fx.Node]:
        """The nodes that read the tensor arguments, in order."""
        return [node for node in self.program.graph.nodes if node.op == "get_attr"]


@cache
def _fake_mode() -> FakeTensorMode:
    """The mode of all these programs, which remembers the types of equal calls."""
    return FakeTensorMode()


def program_of(call: Call) -> OneCall | None:
    """The call as a program; None where its results are no dense tensors, or sizes depend on values."""
    graph, root, mode = fx.Graph(), nn.Module(), _fake_mode()
    reads: dict[int, fx.Node] = {}
    for number, tensor in enumerate(call.tensors):
        root.register_buffer(f"argument_{number}", tensor)
        read = reads[id(tensor)] = graph.get_attr(f"argument_{number}")
        nodes.set_value(read, fake.fake_weight(mode, tensor))
    as_node = lambda value: reads[id(value)] if isinstance(value, torch.Tensor) else value  # noqa: E731
    args, kwargs = pytree.tree_map(as_node, (call.args, dict(call.kwargs)))
    node = graph.create_node("call_function", call.target, args, kwargs)
    try:
        fake_value = fake.fake_call(mode, node)
    # Operators whose sizes depend on values refuse fake tensors, each in its own way.
    except Exception:
        return None
    nodes.set_value(node, fake_value)
    parts = list(cast("Sequence[object]", fake_value)) if isinstance(fake_value, (tuple, list)) else [fake_value]
    if not parts or not all(isinstance(part, torch.Tensor) and part.layout is torch.strided for part in parts):
        return None
    results = (node,)
    if isinstance(fake_value, (tuple, list)):
        results = tuple(graph.call_function(operator.getitem, (node, index)) for index in range(len(parts)))
        for result, part in zip(results, parts, strict=True):
            nodes.set_value(result, part)
    graph.output(results)
    signature = Signature((), (), (), pytree.tree_structure([0] * len(results)), {})
    return OneCall(Program("OneCall", fake.FlatModule(root, graph), signature), node, results)


def run(one: OneCall) -> list[torch.Tensor]:
    """The results of the call."""
    return cast("list[torch.Tensor]", [*one.program.run([])])
