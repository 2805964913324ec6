"""The errors of a program's nodes: each compared with the node of the original program that it stands for.

Both programs run side by side, one call at a time. A value of the original is freed as soon as it was compared, so few
activations are in memory at once. For a sparse attention, the fraction of the original's softmax mass at the visible keys is
measured too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Group, RenderableType
from rich.text import Text
from torch import fx

from lissom.compiler.analysis.structure.linear import is_attention
from lissom.compiler.analysis.structure.masks import HIDDEN
from lissom.compiler.analysis.structure.operands import is_causal, mask_of
from lissom.compiler.calibration.attention_weights import operands_of, row_of, weighted_rows
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import BlockSparseAttention, UnpaddedAttention
from lissom.compiler.ir.interpreter import steps
from lissom.compiler.ir.match import memory_of
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample
from lissom.compiler.verify.divergence import both_unfilled, lasting
from lissom.inspect.kernels import short_name, without_numbers
from lissom.inspect.roofline import sizes_text
from lissom.inspect.tables import plain, plain_table
from lissom.ops import fused_attention, merged_attention, unpadded_attention
from lissom.ops.fused_attention import band_mask
from lissom.ops.pattern import Pattern

_MASK_VALUE = 1e30
"""Values of this magnitude are mask values, which would hide the error of all others."""
_MOST = 12
_ROUNDING = 1e-6
_SPARSIFIES = "sparsify-attention"
_LOWERED = (fused_attention, merged_attention, unpadded_attention)


@dataclass(frozen=True, repr=False)
class NodeErrors:
    """The errors of a program's nodes on the example inputs; prints as a table of the largest.

    Attributes:
        title: the program and the sizes of the inputs.
        nodes: by name the relative error √(Σ(y − x)² / Σx²) of the values y of a node to the values x of the original's; nodes
            without a counterpart of the same shape are left out.
        kept_mass: by name of a sparse attention the fraction of the original's softmax mass at the keys it sees, over heads and
            tokens that are no padding.
        places: by name the module path and the operator.

    Examples:
        >>> import torch, lissom
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)).eval()
        >>> optimized = lissom.optimize(model, torch.randn(4, 64), passes="cast{dtype=bf16}", checks="structural")
        >>> errors = optimized.report.errors().nodes
        >>> 0 < errors["linear"] < 0.01 and 0 < errors["linear_1"] < 0.01
        True
    """

    title: str
    nodes: Mapping[str, float]
    kept_mass: Mapping[str, float]
    places: Mapping[str, tuple[str, str]]

    def __rich__(self) -> RenderableType:
        return _tables(self)

    def __str__(self) -> str:
        return plain(_tables(self))

    def __repr__(self) -> str:
        return f"<NodeErrors of {self.title}: {len(self.nodes)} nodes; print it to read the largest>"


def measure_node_errors(original: Program, program: Program, sample: Sample, replaced: Mapping[str, str]) -> NodeErrors:
    """The errors of `program`, which passes made of `original`, for the same flat inputs.

    Args:
        replaced: for names of nodes the name of the node that each one replaced, in any pass.
    """
    pairs = _pairs(original, program, replaced)
    counterparts = ((node, memory_of(before) if node.target is merged_attention else before) for node, before in pairs.items())
    attentions = {node: before for node, before in counterparts if is_attention(before)}
    readers = Counter(pairs.values())
    readers.update(operand for node in attentions.values() for operand in operands_of(node))
    running = _Running(original, sample, readers)
    errors, masses = dict[str, float](), dict[str, float]()
    masks = _Masks(program, sample, [node for node in attentions if _mask(node) is not None])

    def observe(node: fx.Node, value: object) -> None:
        masks.keep(node, value)
        before = pairs.get(node)
        if before is None:
            return
        error = None if both_unfilled(original, before.name, node) else rms_error(running.value(before), value)
        if error is not None:
            errors[node.name] = error
        if node in attentions:
            values = {operand: running.tensor(operand) for operand in operands_of(attentions[node])}
            mass = _kept_mass(original, attentions[node], sample, values, masks.visible(node, values))
            if mass is not None and (_SPARSIFIES in nodes.origin(node).passes or mass < 1 - _ROUNDING):
                masses[node.name] = mass

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kept in (original, program):
            stack.enter_context(kept_state(kept))
        program.run(sample, observe)
    dimensions, sizes = program.signature.dimensions, program.signature.sizes_of(sample)
    named = {dimensions[symbol].name: size for symbol, size in sizes.items() if symbol in dimensions}
    title = f"{program.name}, {sizes_text(named)}"
    places = {node.name: (nodes.origin(node).module_path, short_name(node)) for node in pairs}
    return NodeErrors(title, errors, masses, places)


def _pairs(original: Program, program: Program, replaced: Mapping[str, str]) -> dict[fx.Node, fx.Node]:
    """For each node of the program its counterpart in the original: of the same name, or the one that it replaced."""
    originals = {node.name: node for node in original.nodes()}
    counterparts: dict[fx.Node, fx.Node] = {}
    for node in program.nodes():
        name, seen = node.name, set[str]()
        while name and name not in originals and name not in seen:
            seen.add(name)
            name = (nodes.origin(node).replaces if name == node.name else "") or replaced.get(name, "")
        if name in originals:
            counterparts[node] = originals[name]
    return counterparts


class _Running:
    """The values of a program's nodes, computed when they are asked for.

    Args:
        readers: how often the value of each node is asked for; after that it is freed.
    """

    def __init__(self, program: Program, sample: Sample, readers: Counter[fx.Node]) -> None:
        self._program = program
        self._steps = steps(program.graph, program.graph_module, sample)
        self._given = dict(zip(program.placeholders, sample, strict=True))
        self._readers = readers
        self._held: dict[fx.Node, object] = {}

    def value(self, node: fx.Node) -> object:
        if node.op != "call_function":
            return self._given[node] if node in self._given else self._program.weight(str(node.target))
        while node not in self._held:
            computed, value = next(self._steps)
            if self._readers[computed]:
                self._held[computed] = lasting(computed, value)
        self._readers[node] -= 1
        return self._held[node] if self._readers[node] else self._held.pop(node)

    def tensor(self, node: fx.Node) -> torch.Tensor:
        value = self.value(node)
        assert isinstance(value, torch.Tensor)
        return value


def rms_error(wanted: object, actual: object) -> float | None:
    """√(Σ(y − x)² / Σx²) for the values x that are wanted and those y that were found; the largest of the items of tuples.

    None if they differ in shape, or are no floating-point tensors. Mask values of x do not count; NaN, infinities and mask
    values of y count as 0. If all values of x are 0, the error is 1, or 0 if those of y are too.
    """
    if isinstance(wanted, (tuple, list)) and isinstance(actual, (tuple, list)) and len(wanted) == len(actual):
        return max(
            (error for pair in zip(wanted, actual, strict=True) if (error := rms_error(*pair)) is not None), default=None
        )
    if not isinstance(wanted, torch.Tensor) or not isinstance(actual, torch.Tensor) or wanted.shape != actual.shape:
        return None
    if not wanted.is_floating_point() or not actual.is_floating_point() or not wanted.numel():
        return None
    precise = torch.float64 if wanted.dtype == torch.float64 else torch.float32
    x, y = wanted.detach().to(precise), actual.detach().to(precise)
    if torch.equal(x, y):
        return 0.0
    counted = x.abs() < _MASK_VALUE
    y = y.where(counted & (y.abs() < _MASK_VALUE), 0.0)
    x = x.where(counted, 0.0)
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    size, difference = float(norm(x)), float(norm(y - x))
    return difference / size if size else float(difference > 0)


class _Masks:
    """The masks of the program's attentions, by their values."""

    def __init__(self, program: Program, sample: Sample, attentions: Iterable[fx.Node]) -> None:
        self._program = program
        self._values: dict[fx.Node, object] = dict(zip(program.placeholders, sample, strict=True))
        self._readers = Counter(_mask(node) for node in attentions)

    def keep(self, node: fx.Node, value: object) -> None:
        if node in self._readers:
            self._values[node] = value

    def visible(self, node: fx.Node, operands: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor | None:
        """The keys visible to an attention: booleans that broadcast to [batch, heads, queries, keys]; None if it sees all.

        Args:
            operands: those of the original's attention.
        """
        q, k = [*operands.values()][:2]
        shape = q.shape[2], k.shape[2]
        if (sparse := BlockSparseAttention.of(node)) is not None:
            table = None if sparse.layout is None else self._tensor(sparse.layout)
            return Pattern.decode(sparse.pattern, sparse.block).mask(*shape, table)[None]
        low = high = None
        if (unpadded := UnpaddedAttention.of(node)) is not None:
            low, high = unpadded.low, unpadded.high
        elif is_causal(node) or (nodes.is_call(node, *_LOWERED) and nodes.argument(node, "causal")):
            high = 0
        seen = band_mask(*shape, low, high, q.device)
        if (mask := _mask(node)) is None:
            return seen
        value = self._tensor(mask)
        value = value if value.dtype == torch.bool else value > HIDDEN
        self._readers[mask] -= 1
        if not self._readers[mask]:
            self._values.pop(mask, None)
        return value if seen is None else value & seen

    def _tensor(self, node: fx.Node) -> torch.Tensor:
        tensor = self._program.weight(str(node.target)) if node.op == "get_attr" else self._values[node]
        assert isinstance(tensor, torch.Tensor)
        return tensor


def _mask(node: fx.Node) -> fx.Node | None:
    """The mask of an attention of any operator; None when there is none."""
    if is_attention(node):
        return mask_of(node)
    mask = nodes.argument(node, "bias") if nodes.is_call(node, *_LOWERED) else None
    return mask if isinstance(mask, fx.Node) else None


def _kept_mass(
    program: Program, node: fx.Node, sample: Sample, values: Mapping[fx.Node, torch.Tensor], visible: torch.Tensor | None
) -> float | None:
    """The fraction of an attention's softmax mass at visible keys; None if the mask has other heads or tokens.

    Queries of padding, and queries that see no key, do not count.
    """
    q, k = [*values.values()][:2]
    shape = torch.Size((q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    if visible is None:
        return 1.0
    if visible.dim() > 4 or any(
        size not in (1, wanted) for size, wanted in zip(visible.shape[::-1], shape[::-1], strict=False)
    ):
        return None
    kept = total = 0.0
    for row, (_, weights, real) in enumerate(weighted_rows(program, sample, node, values)):
        if real is not None:
            weights = weights * real.to(weights.device)[:, None]
        seen = row_of(visible.reshape((1,) * (4 - visible.dim()) + visible.shape), row)[0].to(weights.device)
        kept, total = kept + float((weights * seen).sum()), total + float(weights.sum())
    return kept / total if total else None


def _tables(measured: NodeErrors) -> RenderableType:
    """The largest errors, equal nodes of identical layers together, and the kept mass of each sparse attention."""
    table = plain_table(f"{measured.title}: error of nodes to the original's")
    table.add_column("module", overflow="fold")
    table.add_column("operator", no_wrap=True)
    for heading in ("nodes", "largest error"):
        table.add_column(heading, justify="right", no_wrap=True)
    groups: dict[tuple[str, str], list[float]] = {}
    for name, error in measured.nodes.items():
        path, operator = measured.places[name]
        groups.setdefault((without_numbers(path), operator), []).append(error)
    for (path, operator), errors in sorted(groups.items(), key=lambda group: -max(group[1]))[:_MOST]:
        table.add_row(Text(path), operator, str(len(errors)), f"{max(errors):.1e}")
    if not measured.kept_mass:
        return table
    masses = plain_table("\nsoftmax mass of the original at the keys that sparse attentions see")
    masses.add_column("attention", overflow="fold")
    masses.add_column("mass", justify="right", no_wrap=True)
    for name, mass in measured.kept_mass.items():
        masses.add_row(Text(measured.places[name][0] or name), f"{100 * mass:.1f} %")
    return Group(table, masses)
