"""The softmax weights of an attention, from the values of its operands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import fx

from lissom.compiler.analysis.structure.operands import is_causal, mask_of, scale_of, softcap_of
from lissom.compiler.ir.calls import Attention


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The queries and keys of an attention, then its mask and its sinks if it has them."""
    masks = (operand for operand in (mask_of(node), node.kwargs.get("sinks")) if isinstance(operand, fx.Node))
    return [Attention(node).q, Attention(node).k, *masks]


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
