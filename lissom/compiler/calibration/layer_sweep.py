"""Sequential calibration: run all samples through a program together, stopping before chosen layers so that they can change.

All samples run up to the first chosen layer; the caller gets the layer's inputs and may set its weight; then all samples
continue with that weight. Each layer is thus calibrated on the outputs of the already changed layers before it, at the cost of
one run of the program. Between two stops only the values that are read later are kept: the residual stream, the masks and the
next layer's inputs, of every sample. Values that depend on no input are computed once for all samples.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import fx

from lissom.compiler.analysis.cost import example_shape
from lissom.compiler.analysis.structure.linear import input_of, is_linear
from lissom.compiler.analysis.structure.matrix import Matrix, matrix_of
from lissom.compiler.analysis.structure.real_tokens import token_mask
from lissom.compiler.calibration.statistics import NO_TOKENS, Moments, check_finite, real_rows
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import GroupedProduct
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.interpreter import call
from lissom.compiler.ir.match import computed_from
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.paging import spill

TokenWeights = Callable[[fx.Node, Sequence[torch.Tensor]], Sequence[torch.Tensor] | None]
"""From a layer and its inputs, [tokens, features] per sample, to token weights, [tokens] per sample; None for equal weights."""
_Sweep = Generator[tuple[fx.Node, list[torch.Tensor], list[torch.Tensor]]]


def sweep(
    program: Program, data: Sequence[Sample], layers: Collection[fx.Node], masks: Program | None = None
) -> Generator[tuple[fx.Node, list[torch.Tensor]]]:
    """Each of these linear layers in the order of the graph, with its inputs: [real tokens, features] for every sample.

    Before it asks for the next layer, the caller may set the weight of the current layer and of later ones.

    Args:
        masks: the program whose attention masks tell the real tokens, for comparing two programs; by default the program
            itself.

    Raises:
        RequirementError: when a value is infinite or NaN.
    """
    for layer, read, _ in _sweep_changed(program, data, layers, masks or program):
        yield layer, read


@dataclass(frozen=True)
class Read:
    """Statistics of the inputs of the layers that share one weight.

    Attributes:
        moments: of x, their inputs in the program at that time.
        shift: Σ (x₀ - x)·xᵀ, [features, features], with x₀ their inputs in the other program; None when there is none.
        experts: the moments of each expert's rows; empty for a single matrix.
    """

    moments: Moments
    shift: torch.Tensor | None = None
    experts: tuple[Moments, ...] = ()

    @property
    def each(self) -> tuple[Moments, ...]:
        """The moments of the inputs of each matrix: one for a layer, one per expert for a stack."""
        return self.experts or (self.moments,)


@dataclass(frozen=True)
class Counterpart:
    """Another program that runs on the same data, and its layers that correspond to layers of this one."""

    program: Program
    layers: Mapping[fx.Node, fx.Node]

    @classmethod
    def of(cls, program: Program, layers: Mapping[fx.Node, Matrix], reference: Program) -> Counterpart:
        """The layers of the same name and with the same weights in another program.

        Experts have none: they may read other tokens there. So do layers whose number of rows depends on values.
        """
        known = {node.name: node for node in reference.nodes() if is_linear(node) and 0 not in example_shape(input_of(node))}
        counterparts: dict[fx.Node, fx.Node] = {}
        for layer, matrix in layers.items():
            held = matrix_of(known[layer.name]) if layer.name in known else ""
            if isinstance(held, Matrix) and torch.equal(held.read(reference), matrix.read(program)):
                counterparts[layer] = known[layer.name]
        return cls(reference, counterparts)


def sweep_moments(
    program: Program,
    data: Sequence[Sample],
    weights: Mapping[fx.Node, str],
    first: Collection[str] = (),
    *,
    token_weights: TokenWeights = lambda layer, read: None,
    counterpart: Counterpart | None = None,
) -> Generator[tuple[fx.Node, Read]]:
    """For each weight one of the layers that use it, and the moments of the inputs of all of them.

    Args:
        weights: the name of each layer's weight. Weights shared by several layers, and those named in `first`, come first, with
            the moments of the unchanged program; then the others as in `sweep`, with token weights, and compared to the inputs
            of their counterparts. The caller may set the weight of the current layer.
    """
    readers: dict[str, list[fx.Node]] = {}
    for layer, name in weights.items():
        readers.setdefault(name, []).append(layer)
    early = {name: layers for name, layers in readers.items() if len(layers) > 1 or name in first}
    chosen = {layer for layers in early.values() for layer in layers}
    seen: dict[tuple[object, ...], tuple[Moments, ...]] = {}
    for layer, read, ends in _sweep(program, data, chosen, _computed_from_weights(program), set(), program):
        if _rows_of(layer) not in seen:
            seen[_rows_of(layer)] = (moments_of(read), *_by_expert(read, ends))
    for layers in early.values():
        whole, *experts = (Moments.sum(parts) for parts in zip(*(seen[_rows_of(layer)] for layer in layers), strict=True))
        yield layers[0], Read(whole, None, tuple(experts))
    late = [node for node in program.graph.nodes if node in weights and node not in chosen]
    others = _counterparts(data, late, counterpart)
    known: tuple[tuple[object, ...], Read] | None = None
    for layer, read, ends in _sweep_changed(program, data, late, program if counterpart is None else counterpart.program):
        wanted, counts = next(others), token_weights(layer, read)
        if counts is not None or known is None or known[0] != _rows_of(layer):
            shift = None if wanted is None else shift_of(read, wanted, counts)
            read_moments = Read(moments_of(read, counts), shift, _by_expert(read, ends))
            known = (_rows_of(layer), read_moments) if counts is None else None
        else:
            read_moments = known[1]
        yield layer, read_moments


def _counterparts(
    data: Sequence[Sample], layers: Sequence[fx.Node], counterpart: Counterpart | None
) -> Iterator[list[torch.Tensor] | None]:
    """The inputs of each layer's counterpart, per sample; None for a layer without a counterpart."""
    known = {} if counterpart is None else counterpart.layers
    others = {layer: known[layer] for layer in layers if layer in known}
    in_order = list(others.values())
    if counterpart is None or in_order != sorted(in_order):
        yield from (None for _ in layers)
        return
    reads = sweep(counterpart.program, data, in_order)
    for layer in layers:
        yield next(reads)[1] if layer in others else None


def has_tokens(edit: Editor, layer: fx.Node, read: Read) -> bool:
    """True where calibration gives a layer tokens, or some of its experts; those without are reported as skipped."""
    unread = sum(not moments.count for moments in read.each)
    if unread:
        edit.skip(layer, f"{unread} of its {len(read.experts)} experts: {NO_TOKENS}" if read.experts else NO_TOKENS)
    return unread < len(read.each)


def _rows_of(layer: fx.Node) -> tuple[object, ...]:
    """The input of a layer and, for a stack of experts, the ends of their rows."""
    grouped = GroupedProduct.of(layer)
    return input_of(layer), *([] if grouped is None else [grouped.ends])


def _by_expert(read: Sequence[torch.Tensor], ends: Sequence[torch.Tensor]) -> tuple[Moments, ...]:
    """The moments of each expert's rows, given the end of its rows in each sample; empty for a layer without experts."""
    if not ends:
        return ()
    parts = [rows.tensor_split(last.tolist())[:-1] for rows, last in zip(read, ends, strict=True)]
    return tuple(moments_of(rows) for rows in zip(*parts, strict=True))


def moments_of(read: Sequence[torch.Tensor], counts: Sequence[torch.Tensor] | None = None) -> Moments:
    """The moments of the inputs from `sweep`.

    Args:
        counts: the token weights of each sample, 1 by default.
    """
    sums = Moments.empty(read[0].shape[-1], read[0].device)
    for rows, weights in zip(read, counts or [None] * len(read), strict=True):
        sums.add(rows, weights)
    return sums


def shift_of(
    read: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], counts: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """Σ (x₀ - x)·xᵀ, x of `read` and x₀ of `wanted`.

    Args:
        counts: as in `moments_of`.
    """
    total = torch.zeros(2 * read[0].shape[-1:], device=read[0].device)
    for index, (rows, other) in enumerate(zip(read, wanted, strict=True)):
        weighted = rows.float() if counts is None else rows.float() * counts[index][:, None]
        total.addmm_((other.float() - rows.float()).T, weighted)
    return total


def _sweep_changed(program: Program, data: Sequence[Sample], layers: Collection[fx.Node], masks: Program) -> _Sweep:
    """As `_sweep`, where the caller may set the weights of the layers: what depends on weights only is computed at each use."""
    constant = _computed_from_weights(program)
    own = [used for layer in layers for used in layer.all_input_nodes if used in constant]
    return _sweep(program, data, layers, constant, set(computed_from(own)), masks)


def _sweep(
    program: Program,
    data: Sequence[Sample],
    layers: Collection[fx.Node],
    constant: set[fx.Node],
    late: set[fx.Node],
    masks: Program,
) -> _Sweep:
    """The layers in order, each with its inputs per sample and, for a stack of experts, the ends of their rows per sample.

    Args:
        constant: nodes that depend on no input, computed once for all samples.
        late: nodes computed at each use.
    """
    needed = set(computed_from(layers))
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
        ends: list[torch.Tensor] = []
        for sample, known in zip(data, values, strict=True):
            held = ChainMap(known, fixed)
            _run(program, [node for node in piece if node not in constant], held, late, last_uses)
            read.append(real_rows(_tensor(held, input_of(layer)), token_mask(masks, sample, input_of(layer))))
            _spill([read[-1], *(value for node, value in known.items() if _is_own(node))])
            if (grouped := GroupedProduct.of(layer)) is not None:
                ends.append(_tensor(held, grouped.ends).cpu())
            check_finite(program, input_of(layer), read[-1])
        for used in (used for node in piece for used in last_uses[node]):
            fixed.pop(used, None)
        start = end
        yield layer, read, ends


def _is_own(node: fx.Node) -> bool:
    """True for a node whose value nobody writes to: an input is the caller's, and the state is written in place."""
    return node.op == "call_function" and not nodes.is_state_write(node)


def _spill(values: Iterable[object]) -> None:
    for value in values:
        if isinstance(value, torch.Tensor):
            spill(value)


def _tensor(values: Mapping[fx.Node, object], node: fx.Node) -> torch.Tensor:
    tensor = values[node]
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _run(
    program: Program,
    order: Sequence[fx.Node],
    values: MutableMapping[fx.Node, object],
    late: Collection[fx.Node],
    last_uses: Mapping[fx.Node, Sequence[fx.Node]],
) -> None:
    """Compute these nodes for one sample, freeing each value after its last use."""

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
    """For each node, the values that no later node reads."""
    seen: set[fx.Node] = set()
    uses: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(order):
        uses[node] = [used for used in node.all_input_nodes if used not in seen]
        seen.update(uses[node])
    return uses


def _computed_from_weights(program: Program) -> set[fx.Node]:
    """The weights, and the calls that depend on weights only."""
    constant: set[fx.Node] = set()
    for node in program.graph.nodes:
        weight = node.op == "get_attr" and str(node.target) not in program.state
        inputs = node.all_input_nodes
        if weight or (node.op == "call_function" and inputs and constant.issuperset(inputs)):
            constant.add(node)
    return constant
