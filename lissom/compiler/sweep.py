"""Sequential calibration: run all samples through a program at once, and halt before chosen layers so that they can change.

Every sample is run up to the first chosen layer; the caller sees what the layer reads and may give it another weight; then
every sample is run on with that weight. So each layer is calibrated on what the layers before it give after they were changed,
at the cost of one run of the program. Kept between two halts is only what is read later: the residual stream, the masks and
what the next layer reads, of every sample.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from operator import attrgetter
from typing import cast

import torch
from torch import fx

from lissom.compiler.calibration import real_rows, token_mask
from lissom.compiler.execute import call
from lissom.compiler.linears import input_of
from lissom.compiler.program import Program
from lissom.compiler.samples import Sample


def sweep(
    program: Program, data: Sequence[Sample], layers: Collection[fx.Node]
) -> Generator[tuple[fx.Node, list[torch.Tensor]]]:
    """Each of these linear layers in the order of the graph, with what it reads: for every sample [real tokens, features].

    The caller may set weights of the layers to come, that of the layer just given included, before it asks for the next.
    """
    needed = _ancestors(layers)
    late = _computed_from_weights(program, layers)
    order = [node for node in program.graph.nodes if node in needed and node not in late]
    last_uses = _last_uses(order)
    values = [dict[fx.Node, object](zip(program.placeholders, sample, strict=True)) for sample in data]
    start = 0
    for end, layer in enumerate(order):
        if layer not in layers:
            continue
        read: list[torch.Tensor] = []
        for sample, known in zip(data, values, strict=True):
            _run(program, order[start:end], known, late, last_uses)
            value = cast(torch.Tensor, known[input_of(layer)])
            read.append(real_rows(value, token_mask(program, sample, input_of(layer))))
        start = end
        yield layer, read


def _run(
    program: Program,
    order: Sequence[fx.Node],
    values: dict[fx.Node, object],
    late: Collection[fx.Node],
    last_uses: dict[fx.Node, list[fx.Node]],
) -> None:
    """Compute these nodes for one sample, and let go of what nothing reads any more."""

    def value_of(node: fx.Node) -> object:
        if node not in late:
            return values[node]
        return attrgetter(str(node.target))(program.graph_module) if node.op == "get_attr" else call(node, value_of)

    with torch.no_grad():
        for node in order:
            if node.op == "get_attr":
                weight = program.weight(str(node.target))
                values[node] = weight.clone() if str(node.target) in program.state else weight
            elif node.op == "call_function":
                values[node] = call(node, value_of)
            for used in last_uses[node]:
                values.pop(used, None)


def _last_uses(order: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that none of the nodes after it reads."""
    seen: set[fx.Node] = set()
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(order):
        found[node] = [used for used in node.all_input_nodes if used not in seen]
        seen.update(found[node])
    return found


def _ancestors(layers: Collection[fx.Node]) -> set[fx.Node]:
    """The layers and everything they are computed from; writes of state are not followed."""
    found: set[fx.Node] = set()
    pending = list(layers)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _computed_from_weights(program: Program, layers: Collection[fx.Node]) -> set[fx.Node]:
    """The layers' weights and views of them, which must be read when they are used and not before."""
    constant: set[fx.Node] = set()
    for node in program.graph.nodes:
        weight = node.op == "get_attr" and str(node.target) not in program.state
        inputs = node.all_input_nodes
        if weight or (node.op == "call_function" and inputs and constant.issuperset(inputs)):
            constant.add(node)
    return _ancestors([used for layer in layers for used in layer.all_input_nodes if used in constant])
