"""LM heads, found so that a training step computes their logits for some tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from lissom.compiler.analysis.structure.linear import as_int, bias_of, input_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Embedding, Linear
from lissom.compiler.ir.interpreter import Observer, call, run
from lissom.compiler.ir.match import computed_from
from lissom.compiler.ir.operators import CASTS, IDENTITIES, is_pointwise
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.training.mixed_precision import rms_norm, short_attention
from lissom.errors import RequirementError
from lissom.ops.quantization import fake_quantize

aten = torch.ops.aten

Weights = tuple[torch.Tensor, torch.Tensor | None]
"""A weight and a bias."""
LARGE = 8192
"""The vocabulary from which logits are computed for some tokens at a time; at 8,192 both ways take the same time."""


@dataclass(frozen=True)
class LmHead:
    """A linear layer that makes token logits, and what leads from it to the output.

    Attributes:
        linear: `aten.linear` with a weight that is computed from weights alone, quantized or not.
        hidden: its input, [batch, tokens, width], for all tokens also where the program computes logits of the last one only.
        stored: the nodes its weight and bias are computed from, in order.
        tail: element-wise calls after it, in order.
        kept: the weight and bias of `fixed_weights`, in the last dtype that was asked for.
    """

    program: Program
    linear: fx.Node
    hidden: fx.Node
    stored: tuple[fx.Node, ...]
    tail: tuple[fx.Node, ...]
    kept: dict[torch.dtype | None, Weights] = field(default_factory=dict["torch.dtype | None", Weights], compare=False)

    @property
    def vocabulary(self) -> int:
        return as_int(nodes.tensor_type(self.linear).shape[-1])

    @property
    def saves_memory(self) -> bool:
        """True if losses are computed from the hidden state: for large vocabularies, or where only few tokens have logits."""
        return self.vocabulary >= LARGE or (bool(self.program.state) and input_of(self.linear) is not self.hidden)

    def weights(self, dtype: torch.dtype | None = None) -> Weights:
        """The weight, [vocabulary, width], and the bias, [vocabulary]; gradients flow to what they are computed from.

        Args:
            dtype: that they are converted to; None leaves them as they are.
        """
        with torch.enable_grad():  # a sharded weight is gathered as it is read, and needs gradients only here
            learns = any(self.program.weight(str(node.target)).requires_grad for node in self.stored if node.op == "get_attr")
        if not learns:
            return self.fixed_weights(dtype)
        return self._weights(dtype)

    def fixed_weights(self, dtype: torch.dtype | None = None) -> Weights:
        """The weight and bias without gradients, computed once for many calls with one dtype, for weights that are fixed."""
        if dtype not in self.kept:
            self.kept.clear()
            with torch.no_grad():
                self.kept[dtype] = self._weights(dtype)
        return self.kept[dtype]

    def _weights(self, dtype: torch.dtype | None) -> Weights:
        values = self._values(self.stored, {})
        weight, bias = values[Linear(self.linear).weight], bias_of(self.linear)
        shift = None if bias is None else values[bias]
        return (weight, shift) if dtype is None else (weight.to(dtype), None if shift is None else shift.to(dtype))

    def finish(self, product: torch.Tensor) -> torch.Tensor:
        """The logits from the result of the linear layer, both [rows, vocabulary]."""
        reads = [used for node in self.tail for used in node.all_input_nodes if used.op == "get_attr"]
        return self._values((*reads, *self.tail), {self.linear: product})[(self.linear, *self.tail)[-1]]

    def _values(self, order: tuple[fx.Node, ...], given: Mapping[fx.Node, torch.Tensor]) -> dict[fx.Node, torch.Tensor]:
        values: dict[fx.Node, Any] = dict(given)
        for node in order:
            # A selection of tokens changes nothing where rows are tokens.
            if _selects_tokens(node):
                values[node] = values[nodes.operand(node)]
            else:
                values[node] = (
                    self.program.weight(str(node.target)) if node.op == "get_attr" else call(node, values.__getitem__)
                )
        return values


def lm_head_of(program: Program, leaf: object) -> LmHead | None:
    """The LM head that makes an output [batch, tokens, vocabulary]; None where anything but element-wise calls follows it."""
    tail: list[fx.Node] = []
    node = leaf
    while nodes.is_tensor(node) and node.op == "call_function" and node.target is not aten.linear.default:
        computed = [used for used in node.all_input_nodes if used.op != "get_attr"]
        fixed = [program.weight(str(used.target)) for used in node.all_input_nodes if used.op == "get_attr"]
        simple = _selects_tokens(node) or is_pointwise(node) or node.target in (*CASTS, *IDENTITIES)
        if len(computed) != 1 or not simple or any(isinstance(weight, nn.Parameter) or weight.dim() > 1 for weight in fixed):
            return None
        tail.insert(0, node)
        node = computed[0]
    if not nodes.is_call(node, aten.linear.default) or nodes.tensor_type(node).rank != 3:
        return None
    sources = set(computed_from([Linear(node).weight, bias_of(node)]))
    if any(source.op == "placeholder" for source in sources):
        return None
    hidden = input_of(node)
    while _selects_tokens(hidden):
        hidden = nodes.operand(hidden)
    return LmHead(program, node, hidden, tuple(source for source in program.graph.nodes if source in sources), tuple(tail))


def _selects_tokens(node: fx.Node) -> bool:
    """True for a slice of the tokens of [batch, tokens, features]."""
    return nodes.is_call(node, aten.slice.Tensor) and nodes.tensor_type(node).rank == 3 and nodes.argument(node, "dim") == 1


@dataclass(frozen=True)
class Trunk:
    """The part of a program that a training step runs: it writes no state, and gives the hidden states of LM heads in place of
    their logits.

    State is what it is between runs, an empty KV cache, so every batch starts a text and no gradient crosses batches. Weights
    are those that the program has when it runs.
    """

    program: Program
    graph: fx.Graph

    @classmethod
    def of(cls, program: Program, heads: Mapping[int, LmHead], name: str) -> Trunk:
        """The trunk of a program.

        Args:
            heads: by the index of their output.
            name: of the pass, for the error.

        Raises:
            RequirementError: when a state is written in a form that takes no gradient.
        """
        trunk = program.copy()
        by_name = {node.name: node for node in trunk}
        leaves = list(trunk.leaves)
        for index, head in heads.items():
            leaves[index] = by_name[head.hidden.name]
        nodes.set_arguments(trunk.output, leaves)
        for write in filter(nodes.is_state_write, reversed(trunk.nodes())):
            if write.users:
                raise RequirementError(
                    f"{name} trains no program that writes state in place; put it before write-state-in-place"
                )
            if nodes.tensor_type(write).dtype in (torch.int8, torch.uint8):
                raise RequirementError(f"{name} has no gradients through a quantized KV cache; put it before quantize-cache")
            trunk.graph.erase_node(write)
        for node in trunk.nodes(aten.embedding.default):
            _quantize_rows_read(node)
        trunk.drop_dead()
        wide: dict[object, Callable[..., object]] = {
            aten.scaled_dot_product_attention.default: short_attention,
            aten.rms_norm.default: rms_norm,
        }
        for node in trunk.nodes(*wide):
            node.target = wide[node.target]
        return cls(program, trunk.graph)

    def run(self, inputs: Sample, observe: Observer | None = None) -> list[object]:
        """The flat outputs, as `Program.run` has them."""
        return run(self.graph, self.program.graph_module, inputs, observe)


def _quantize_rows_read(lookup: fx.Node) -> None:
    """Quantize what an embedding reads of a table with scales by row, and not all of the table at every step."""
    table = Embedding(lookup).table
    if not nodes.is_call(table, fake_quantize):
        return
    stored, scale, zero_point = (nodes.argument(table, name) for name in ("x", "scale", "zero_point"))
    rows = nodes.tensor_type(stored).shape[0]
    if any(isinstance(grid, fx.Node) and nodes.tensor_type(grid).shape[:1] != (rows,) for grid in (scale, zero_point)):
        return
    lookup.target = _quantized_rows
    nodes.set_arguments(lookup, stored, scale, zero_point, *lookup.args[1:], **table.kwargs, **lookup.kwargs)


def _quantized_rows(
    table: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    ids: torch.Tensor,
    *options: Any,
    format: str,
    tensor_scale: float = 1.0,
    **named: Any,
) -> torch.Tensor:
    """`aten.embedding` of a table that is quantized by rows.

    Args:
        options: its further positional arguments.
        named: its keyword arguments.
    """
    x, of_scale = aten.embedding(table, ids, *options, **named), functional.embedding(ids, scale)
    of_zero_point = None if zero_point is None else functional.embedding(ids, zero_point)
    return fake_quantize(x, of_scale, of_zero_point, format=format, tensor_scale=tensor_scale)
