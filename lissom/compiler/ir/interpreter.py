"""Run a program's graph node by node, freeing each value after its last use."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Argument, map_aggregate

from lissom.compiler.ir.collectives import stand_in
from lissom.ops.dense_linear import linear

_LINEAR = torch.ops.aten.linear.default

Observer = Callable[[fx.Node, object], object]
"""Sees a call and its result; a value it returns replaces the result, and None keeps it."""


def run(graph: fx.Graph, weights: nn.Module, inputs: Sequence[torch.Tensor], observe: Observer | None = None) -> list[object]:
    """The flat outputs of the graph; `observe` sees every call's result in order, and may return another value in its place."""
    calls, replacement = steps(graph, weights, inputs), None
    while True:
        try:
            observed = calls.send(replacement)
        except StopIteration as end:
            return end.value
        replacement = None if observe is None else observe(*observed)
        del observed  # or its value would outlive its last use


def steps(
    graph: fx.Graph, weights: nn.Module, inputs: Sequence[torch.Tensor]
) -> Generator[tuple[fx.Node, object], object, list[object]]:
    """Runs the graph one call at a time: yields each call with its result, and returns the flat outputs.

    A value sent back replaces the result; None keeps it.
    """
    values: dict[fx.Node, object] = {}
    last_uses = last_uses_of(graph)
    feed = iter(inputs)
    for node in graph.nodes:
        if node.op == "output":
            return list(with_values(node.args[0], values.__getitem__))
        if node.op == "placeholder":
            values[node] = next(feed)
        elif node.op == "get_attr":
            values[node] = attrgetter(str(node.target))(weights)
        else:
            values[node] = call(node, values.__getitem__)
            if (replacement := (yield node, values[node])) is not None:
                values[node] = replacement
        for used in last_uses.get(node, ()):
            del values[used]
    raise AssertionError("a graph ends in its output node")


ObserverOfEach = Callable[[int, fx.Node, object], object]
"""As `Observer`, with the index of the sample."""


def run_each(
    graph: fx.Graph,
    weights: nn.Module,
    samples: Sequence[Sequence[torch.Tensor]],
    states: Sequence[Mapping[str, torch.Tensor]],
    observe: ObserverOfEach | None = None,
) -> list[list[object]]:
    """The flat outputs of the graph on each sample, call by call: a weight is read once, and what depends on weights alone is
    computed once.

    Args:
        states: by sample the tensors that are read, and may be written, in place of weights of these names.
    """
    shared: dict[fx.Node, object] = {}
    values: list[dict[fx.Node, object]] = [{} for _ in samples]
    last_uses, feeds = last_uses_of(graph), [iter(sample) for sample in samples]
    for node in graph.nodes:
        if node.op == "output":
            return [list(with_values(node.args[0], ChainMap(own, shared).__getitem__)) for own in values]
        if node.op == "placeholder":
            for own, feed in zip(values, feeds, strict=True):
                own[node] = next(feed)
        elif node.op == "get_attr" and any(node.target in state for state in states):
            for own, state in zip(values, states, strict=True):
                own[node] = state[str(node.target)]
        elif node.op == "get_attr":
            shared[node] = attrgetter(str(node.target))(weights)
        elif node.all_input_nodes and all(_is_shared(used, shared, values) for used in node.all_input_nodes):
            shared[node] = call(node, shared.__getitem__)
        else:
            for own in values:
                own[node] = call(node, ChainMap(own, shared).__getitem__)
        if observe is not None and node.op == "call_function":
            for index, own in enumerate(values):
                given = own[node] if node in own else shared[node]
                if (replacement := observe(index, node, given)) is not None:
                    own[node] = replacement
                del given
        for used in last_uses.get(node, ()):
            shared.pop(used, None)
            for own in values:
                own.pop(used, None)
    raise AssertionError("a graph ends in its output node")


def _is_shared(node: fx.Node, shared: Collection[fx.Node], values: Sequence[Collection[fx.Node]]) -> bool:
    """True if a node has one value for all samples."""
    return node in shared and not any(node in own for own in values)


REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""The exceptions that a model, or its program, may raise on inputs it does not accept."""


def call(node: fx.Node, value_of: Callable[[fx.Node], object], adapted: Callable[[object], Any] | None = None) -> object:
    """The result of a call node, with the values of the nodes it reads.

    Args:
        adapted: applied to all arguments.
    """
    target: Any = linear if node.target is _LINEAR else stand_in(node.target) or node.target
    given = with_values((node.args, node.kwargs), value_of)
    args, kwargs = given if adapted is None else map_aggregate(given, adapted)
    return target(*args, **kwargs)


def with_values(arguments: Argument, value_of: Callable[[fx.Node], Any]) -> Any:
    """The arguments with every node in them replaced by its value."""
    return fx.map_arg(arguments, value_of)


def last_uses_of(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that nothing reads after it."""
    seen: set[fx.Node] = set()
    last_uses: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        if node.op == "output":
            seen.update(node.all_input_nodes)
            continue
        finished = [used for used in (node, *node.all_input_nodes) if used not in seen]
        seen.update(finished)
        if finished:
            last_uses[node] = finished
    return last_uses


def evaluate_nodes(weights: nn.Module, node: fx.Node) -> torch.Tensor:
    """The tensor a node yields, when it depends on weights alone."""
    order: list[fx.Node] = []
    pending, seen = [(node, False)], set()
    while pending:
        current, ready = pending.pop()
        if ready:
            order.append(current)
        elif current not in seen:
            seen.add(current)
            pending += [(current, True), *((used, False) for used in current.all_input_nodes)]
    values: dict[fx.Node, object] = {}
    with torch.no_grad():
        for current in order:
            if current.op == "get_attr":
                values[current] = attrgetter(str(current.target))(weights)
            else:
                values[current] = call(current, values.__getitem__)
    tensor = values[node]
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach().clone()
