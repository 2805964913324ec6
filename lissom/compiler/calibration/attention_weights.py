"""The softmax weights of an attention, from the values of its operands."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import fx

from lissom.compiler.analysis.structure.operands import is_causal, mask_of, scale_of, softcap_of
from lissom.compiler.analysis.structure.real_tokens import token_mask
from lissom.compiler.calibration.partial_run import Stream
from lissom.compiler.ir.calls import Attention
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample

Row = tuple[dict[fx.Node, torch.Tensor], torch.Tensor, torch.Tensor | None]
"""The operands of an attention, its softmax weights, and which queries are no padding, [queries]; None when none is."""


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The queries and keys of an attention, then its mask and its sinks if it has them."""
    masks = (operand for operand in (mask_of(node), node.kwargs.get("sinks")) if isinstance(operand, fx.Node))
    return [Attention(node).q, Attention(node).k, *masks]


def rows_on_data(
    program: Program, data: Sequence[Sample], attentions: Collection[fx.Node], progress: Callable[[int, int], None]
) -> Iterator[tuple[fx.Node, Row]]:
    """The rows of these attentions on calibration data; one sample and one attention are in memory at a time."""
    order = [node for node in program.graph.nodes if node in attentions]
    for finished, sample in enumerate(data):
        stream = Stream(program, [sample])
        for node in order:
            wanted = operands_of(node)
            values = dict(zip(wanted, stream.advance(0, node, wanted), strict=True))
            for row in weighted_rows(program, sample, node, values):
                yield node, row
        progress(finished + 1, len(data))


def weighted_rows(program: Program, sample: Sample, node: fx.Node, values: Mapping[fx.Node, torch.Tensor]) -> Iterator[Row]:
    """The rows of the batch of an attention.

    Args:
        values: of its operands, the queries first.
    """
    real = token_mask(program, sample, operands_of(node)[0], axis=2)
    for row, given in enumerate(rows_of(values)):
        yield given, attention_weights(node, given), None if real is None else real[row]


def rows_of(values: Mapping[fx.Node, torch.Tensor]) -> Iterator[dict[fx.Node, torch.Tensor]]:
    """The values of the operands for each row of the batch; the queries come first."""
    for row in range(len(next(iter(values.values())))):
        yield {node: row_of(value, row) for node, value in values.items()}


def row_of(value: torch.Tensor, row: int) -> torch.Tensor:
    """One row of the batch of an operand; the operand itself if all rows share it."""
    return value[row : row + 1] if value.dim() == 4 and value.shape[0] > 1 else value


def attention_weights(node: fx.Node, values: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
    """The softmax weights of one row of the batch, [heads, queries, keys]; zeros for a query without visible keys."""
    q, k = (values[operand].float() for operand in (Attention(node).q, Attention(node).k))
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    mask, sinks = (
        None if not isinstance(operand, fx.Node) else values[operand] for operand in (mask_of(node), node.kwargs.get("sinks"))
    )
    if is_causal(node):
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = q @ k.transpose(-1, -2) * scale_of(node)
    if softcap := softcap_of(node):
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
    return torch.softmax(scores, -1)[0, ..., : k.shape[2]].nan_to_num(0.0)
