"""The kind of an attention's mask, found by computing it: causal, windowed, padding, or a bias.

The part of the program that computes a mask is small. It is run on inputs of ones, and again with the end of each input
zeroed; the results show the kind of mask, whatever operators the author used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from lissom.compiler.analysis.structure.operands import is_causal
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention
from lissom.compiler.ir.interpreter import REFUSALS, call
from lissom.compiler.ir.match import computed_from
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.signature import evaluate
from lissom.compiler.ir.types import ScalarType

aten = torch.ops.aten

_PROBE = 1100
"""Tokens the mask is computed for: more than the usual windows of 128, 512 and 1,024."""
MOST_CALLS = 400
"""The most calls of a mask; each is run here, so longer chains are not analysed."""
HIDDEN = -1e4
"""A score with this or less added has a softmax weight of exactly zero; BERT uses this value."""
_SMALLEST = 3
"""With fewer queries or keys, a causal mask cannot be distinguished from others."""
_LAYERS = (aten.linear.default, aten.addmm.default, aten.bmm.default)
Values = Mapping[fx.Node, torch.Tensor]


@dataclass(frozen=True)
class MaskKind:
    """A mask's pattern.

    Attributes:
        causal: later tokens are masked.
        window: the number of visible tokens back, None without a limit.
        padding: it depends on the caller's inputs.
        bias: it has finite values other than zero, or depends on q.
    """

    causal: bool = False
    window: int | None = None
    padding: bool = False
    bias: bool = False

    def __str__(self) -> str:
        words = ["causal"] if self.causal else []
        words += [f"window {self.window}"] if self.window else []
        words += ["padding"] if self.padding else []
        words += ["bias"] if self.bias else []
        return " + ".join(words) or "none"


def mask_kind(program: Program, attention: fx.Node) -> MaskKind:
    """The kind of one attention's mask; a mask shared by several attentions is computed once."""
    kinds = program.fact(_cache)
    mask = Attention(attention).mask
    if mask is None:
        return MaskKind(causal=is_causal(attention))
    if mask not in kinds:
        kinds[mask] = _kind(program, mask)
    return kinds[mask]


def _cache(program: Program) -> dict[fx.Node, MaskKind]:
    return {}


def _kind(program: Program, mask: fx.Node) -> MaskKind:
    order = dependencies([mask], lambda node: node.target in _LAYERS)
    if order is None:
        return MaskKind(bias=True)
    inputs = any(node.op == "placeholder" for node in order)
    try:
        plain = _compute(program, order, masked=False)
        masked = _compute(program, order, masked=True) if inputs else plain
    except REFUSALS:  # a mask that cannot be computed for these sizes is left undescribed
        return MaskKind(padding=inputs, bias=True)
    blocked = ~plain if plain.dtype == torch.bool else plain <= HIDDEN
    padding = inputs and (masked.shape != plain.shape or not torch.equal(masked, plain))
    bias = plain.dtype != torch.bool and bool(plain.masked_fill(blocked, 0).any())
    square = blocked.reshape(-1, *blocked.shape[-2:])[0]
    causal, window = _triangle(square)
    return MaskKind(causal, window, padding, bias)


def _triangle(blocked: torch.Tensor) -> tuple[bool, int | None]:
    """True if later keys are masked, and the number of visible earlier ones.

    Args:
        blocked: [queries, keys].
    """
    rows, columns = blocked.shape
    if min(rows, columns) < _SMALLEST:
        return False, None
    upper = torch.triu(torch.ones(rows, columns, dtype=torch.bool), 1)
    causal = bool(blocked[upper].all())
    last = ~blocked[-1]
    seen = int(last.sum())
    banded = bool(blocked[-1, :2].any()) and 0 < seen < columns
    return causal, seen if banded and bool(last[min(rows, columns) - 1]) else None


def dependencies(
    wanted: Sequence[fx.Node], refused: Callable[[fx.Node], bool], through: Callable[[fx.Node], bool] = lambda node: True
) -> list[fx.Node] | None:
    """The nodes that these depend on, in order; None when one is refused, or they are too many.

    Args:
        through: as in `computed_from`.
    """
    needed = set[fx.Node]()
    for node in computed_from(wanted, through):
        if len(needed) > MOST_CALLS or refused(node):
            return None
        needed.add(node)
    return [node for node in wanted[0].graph.nodes if node in needed]


def _compute(program: Program, order: list[fx.Node], masked: bool) -> torch.Tensor:
    """The mask for a probe of one row and many tokens, as far as the program's ranges allow."""
    sizes = {}
    for symbol, dimension in program.signature.dimensions.items():
        wanted = dimension.minimum if dimension.name == "batch" else _PROBE
        sizes[symbol] = min(wanted, dimension.maximum or wanted)
    given = {node: _ones(node, sizes) for node in order if node.op == "placeholder"}
    for tensor in given.values():
        if tensor.shape == (1,):
            # A single number is the fill position of a KV cache; an empty cache leaves the mask square.
            tensor.zero_()
        elif masked and tensor.dim() > 1:
            tensor[..., tensor.shape[-1] // 2 :] = 0
    return values_at(program, order, sizes, given)[order[-1]]


def values_at(
    program: Program,
    order: Sequence[fx.Node],
    sizes: Mapping[sympy.Symbol, int],
    given: Mapping[fx.Node, torch.Tensor] | None = None,
) -> Values:
    """The values of nodes in order, at these sizes; inputs that are not given are ones."""
    values: dict[fx.Node, Any] = dict(given or {})
    with torch.no_grad():
        for node in order:
            if node not in values:
                values[node] = _value(program, node, sizes, values)
    return values


def _value(program: Program, node: fx.Node, sizes: Mapping[sympy.Symbol, int], values: Mapping[fx.Node, object]) -> object:
    if node.op == "placeholder":
        return _ones(node, sizes)
    if node.op == "get_attr":
        return program.weight(str(node.target))
    if is_size(node) and nodes.operand(node) not in values:
        value_type = nodes.node_type(node)
        assert isinstance(value_type, ScalarType) and not isinstance(value_type.value, float)
        return evaluate(value_type.value, sizes)
    return call(node, values.__getitem__)


def is_size(node: fx.Node) -> bool:
    """True for the size of a dimension."""
    return nodes.is_call(node, aten.sym_size.int)


def _ones(node: fx.Node, sizes: Mapping[sympy.Symbol, int]) -> torch.Tensor:
    tensor_type = nodes.tensor_type(node)
    return torch.ones([evaluate(size, sizes) for size in tensor_type.shape], dtype=tensor_type.dtype, device=tensor_type.device)
