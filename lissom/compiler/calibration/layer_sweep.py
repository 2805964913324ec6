"""Sequential calibration: run all samples through a program at once, and halt before chosen layers so that they can change.

Every sample is run up to the first chosen layer; the caller sees what the layer reads and may give it another weight; then
every sample is run on with that weight. So each layer is calibrated on what the layers before it give after they were changed,
at the cost of one run of the program. Kept between two halts is only what is read later: the residual stream, the masks and
what the next layer reads, of every sample. What depends on no input is computed once for all samples.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import cast

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import input_of, is_linear
from lissom.compiler.analysis.structure.matrix import Matrix, matrix_of
from lissom.compiler.analysis.structure.real_tokens import token_mask
from lissom.compiler.calibration.statistics import Moments, check_finite, real_rows
from lissom.compiler.ir.interpreter import call
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample

TokenWeights = Callable[[fx.Node, Sequence[torch.Tensor]], Sequence[torch.Tensor] | None]
"""From a layer and what it reads, for every sample [tokens, features], to what each token counts, [tokens]; None: all alike."""


def sweep(
    program: Program, data: Sequence[Sample], layers: Collection[fx.Node]
) -> Generator[tuple[fx.Node, list[torch.Tensor]]]:
    """Each of these linear layers in the order of the graph, with what it reads: for every sample [real tokens, features].

    The caller may set weights of the layers to come, that of the layer just given included, before it asks for the next.

    Raises: RequirementError when a value is infinite or NaN.
    """
    constant = _computed_from_weights(program)
    return _sweep(program, data, layers, constant, _behind(layers, constant))


@dataclass(frozen=True)
class Read:
    """What the layers of one weight read.

    moments: of x, what they read in the program as it is by then. shift: Σ (x₀ - x)·xᵀ, x₀: what they read in the other
    program, [features, features]; None where there is none.
    """

    moments: Moments
    shift: torch.Tensor | None = None


@dataclass(frozen=True)
class Counterpart:
    """Another program that is given the same data, and the layers of it that some layers of this one correspond to."""

    program: Program
    layers: Mapping[fx.Node, fx.Node]

    @classmethod
    def of(cls, program: Program, layers: Mapping[fx.Node, Matrix], reference: Program) -> Counterpart:
        """The layers of the same name in another program, as far as they have the same weights."""
        known = {node.name: node for node in reference.nodes() if is_linear(node)}
        found: dict[fx.Node, fx.Node] = {}
        for layer, matrix in layers.items():
            held = matrix_of(known[layer.name]) if layer.name in known else ""
            if isinstance(held, Matrix) and torch.equal(held.read(reference), matrix.read(program)):
                found[layer] = known[layer.name]
        return cls(reference, found)


def sweep_moments(
    program: Program,
    data: Sequence[Sample],
    weights: Mapping[fx.Node, str],
    first: Collection[str] = (),
    *,
    token_weights: TokenWeights = lambda layer, read: None,
    counterpart: Counterpart | None = None,
) -> Generator[tuple[fx.Node, Read]]:
    """For each weight one of the layers that multiply with it, and the moments of what all of them read.

    weights: the name of each layer's weight. Those that several layers share, and those named in `first`, come first, all with
    the moments of the program as it is; then the others as in `sweep`, their tokens weighted, and compared to what their
    counterparts read. The caller may set the weight of the layer given.
    """
    readers: dict[str, list[fx.Node]] = {}
    for layer, name in weights.items():
        readers.setdefault(name, []).append(layer)
    early = {name: layers for name, layers in readers.items() if len(layers) > 1 or name in first}
    chosen = {layer for layers in early.values() for layer in layers}
    seen: dict[fx.Node, Moments] = {}
    for layer, read in _sweep(program, data, chosen, _computed_from_weights(program), set()):
        if input_of(layer) not in seen:
            seen[input_of(layer)] = moments_of(read)
    for layers in early.values():
        yield layers[0], Read(Moments.sum([seen[input_of(layer)] for layer in layers]))
    late = [node for node in program.graph.nodes if node in weights and node not in chosen]
    others = _counterparts(data, late, counterpart)
    known: tuple[fx.Node, Read] | None = None
    for layer, read in sweep(program, data, late):
        wanted, counts = next(others), token_weights(layer, read)
        if counts is not None or known is None or known[0] is not input_of(layer):
            found = Read(moments_of(read, counts), None if wanted is None else shift_of(read, wanted, counts))
            known = (input_of(layer), found) if counts is None else None
        else:
            found = known[1]
        yield layer, found


def _counterparts(
    data: Sequence[Sample], layers: Sequence[fx.Node], counterpart: Counterpart | None
) -> Iterator[list[torch.Tensor] | None]:
    """What the counterpart of each layer reads, sample by sample; None where it has none."""
    others = (
        {} if counterpart is None else {layer: counterpart.layers[layer] for layer in layers if layer in counterpart.layers}
    )
    place = {} if counterpart is None else {node: index for index, node in enumerate(counterpart.program.graph.nodes)}
    in_order = [place[other] for other in others.values()]
    if counterpart is None or in_order != sorted(in_order):
        yield from (None for _ in layers)
        return
    reads = sweep(counterpart.program, data, list(others.values()))
    for layer in layers:
        yield next(reads)[1] if layer in others else None


def moments_of(read: Sequence[torch.Tensor], counts: Sequence[torch.Tensor] | None = None) -> Moments:
    """The moments of what `sweep` gives; counts: what each token of each sample counts, 1 by default."""
    sums = Moments.empty(read[0].shape[-1], read[0].device)
    for index, rows in enumerate(read):
        sums.add(rows, None if counts is None else counts[index])
    return sums


def shift_of(
    read: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], counts: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """Σ (x₀ - x)·xᵀ, x of `read` and x₀ of `wanted`; counts: as in `moments_of`."""
    total = torch.zeros(2 * read[0].shape[-1:], device=read[0].device)
    for index, (rows, other) in enumerate(zip(read, wanted, strict=True)):
        weighted = rows.float() if counts is None else rows.float() * counts[index][:, None]
        total.addmm_((other.float() - rows.float()).T, weighted)
    return total


def _sweep(
    program: Program, data: Sequence[Sample], layers: Collection[fx.Node], constant: set[fx.Node], late: set[fx.Node]
) -> Generator[tuple[fx.Node, list[torch.Tensor]]]:
    """constant: what no input reaches, computed once for all samples; late: what is computed each time it is read."""
    needed = _behind(layers)
    order = [node for node in program.graph.nodes if node in needed and node not in late]
    last_uses = _last_uses(order)
    fixed: dict[fx.Node, object] = {}
    values = [dict[fx.Node, object](zip(program.placeholders, sample, strict=True)) for sample in data]
    start = 0
    for end, layer in enumerate(order):
        if layer not in layers:
            continue
        piece = order[start:end]
        _run(program, [node for node in piece if node in constant], fixed, late, {})
        read: list[torch.Tensor] = []
        for sample, known in zip(data, values, strict=True):
            held = ChainMap(known, fixed)
            _run(program, [node for node in piece if node not in constant], held, late, last_uses)
            value = cast(torch.Tensor, held[input_of(layer)])
            read.append(real_rows(value, token_mask(program, sample, input_of(layer))))
            check_finite(program, input_of(layer), read[-1])
        for used in (used for node in piece for used in last_uses[node]):
            fixed.pop(used, None)
        start = end
        yield layer, read


def _run(
    program: Program,
    order: Sequence[fx.Node],
    values: MutableMapping[fx.Node, object],
    late: Collection[fx.Node],
    last_uses: Mapping[fx.Node, Sequence[fx.Node]],
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
            for used in last_uses.get(node, ()):
                values.pop(used, None)


def _last_uses(order: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that none of the nodes after it reads."""
    seen: set[fx.Node] = set()
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(order):
        found[node] = [used for used in node.all_input_nodes if used not in seen]
        seen.update(found[node])
    return found


def _behind(ends: Collection[fx.Node], within: Collection[fx.Node] | None = None) -> set[fx.Node]:
    """What these layers are computed from, with the layers themselves; or only what of it lies `within`.

    Writes of state are not followed.
    """
    found: set[fx.Node] = set()
    pending = [*ends] if within is None else [used for end in ends for used in end.all_input_nodes if used in within]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _computed_from_weights(program: Program) -> set[fx.Node]:
    """Weights, and what is computed from weights alone."""
    constant: set[fx.Node] = set()
    for node in program.graph.nodes:
        weight = node.op == "get_attr" and str(node.target) not in program.state
        inputs = node.all_input_nodes
        if weight or (node.op == "call_function" and inputs and constant.issuperset(inputs)):
            constant.add(node)
    return constant
