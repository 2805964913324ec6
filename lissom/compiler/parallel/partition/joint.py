"""Operators that read a sharded dimension, as calls on the shards and collectives; see `rules/joint.py`.

A padded shard holds elements that do not exist. They are -inf in a maximum and 0 in a sum, and come last among equal elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import TopK
from lissom.compiler.ir.collectives import ALL_GATHER, GROUP, WAIT
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import BEST, GATHERS, LAYER_NORMS, LOG_SOFTMAX, SOFTMAX
from lissom.compiler.ir.placement import Span, Spans, indices_of
from lissom.compiler.ir.types import TensorType, fixed
from lissom.compiler.ir.view_calls import Gather
from lissom.compiler.parallel.rules.joint import candidates, computed_dtype, packed_dtype
from lissom.ops.formats import FORMATS, LEAST

aten = torch.ops.aten


@dataclass(frozen=True)
class Joint:
    """Writes the calls and collectives that replace one operator.

    Attributes:
        own: makes a weight that differs between ranks, from its name and values.
        reduced: an all-reduce of a value.
    """

    edit: Editor
    world_size: int
    own: Callable[[str, list[torch.Tensor]], fx.Node]
    reduced: Callable[[fx.Node, str], fx.Node]

    def compute(self, node: fx.Node, unsharded: TensorType, result_dtype: torch.dtype, dim: int, span: Span) -> list[fx.Node]:
        """The outputs of a call that reads `dim` of its argument.

        Args:
            unsharded: the unsharded type.
            span: the shards.
        """
        call, x = self.edit.call, nodes.operand(node)
        if nodes.is_call(node, *LOG_SOFTMAX, *SOFTMAX):
            return [self._normalized(node, x, result_dtype, dim, span)]
        if nodes.is_call(node, *GATHERS):
            return [self._looked_up(node, x, dim, span)]
        if nodes.is_call(node, *LAYER_NORMS):
            return [self._normed(node, x, result_dtype, dim, span)]
        if nodes.is_call(node, aten.amax.default):
            kept = bool(nodes.argument(node, "keepdim"))
            return [self.reduced(call(aten.amax.default, self._masked(x, dim, span, -math.inf), [dim], kept), "max")]
        if nodes.is_call(node, aten.logsumexp.default):
            return [self._log_sum(node, x, result_dtype, dim, span)]
        best, places = self._best(node, x, packed_dtype(unsharded, dim), dim, span)
        best = call(aten.to.dtype, best, unsharded.dtype) if nodes.tensor_type(best).dtype != unsharded.dtype else best
        if nodes.is_call(node, *BEST) and not nodes.argument(node, "keepdim"):
            best, places = (call(aten.squeeze.dim, values, dim) for values in (best, places))
        return [places] if nodes.is_call(node, aten.argmax.default) else [best, places]

    def _normalized(self, node: fx.Node, x: fx.Node, result_dtype: torch.dtype, dim: int, span: Span) -> fx.Node:
        """softmax or log softmax, from the maximum and the sum of exponentials over all shards."""
        call, x = self.edit.call, self._in(x, computed_dtype(node))
        greatest = self.reduced(call(aten.amax.default, self._masked(x, dim, span, -math.inf), [dim], True), "max")
        below = call(aten.sub.Tensor, x, greatest)
        powers = self._masked(call(aten.exp.default, below), dim, span, 0)
        total = self.reduced(call(aten.sum.dim_IntList, powers, [dim], True), "sum")
        if nodes.is_call(node, *SOFTMAX):
            return self._in(call(aten.div.Tensor, powers, total), result_dtype)
        return self._in(call(aten.sub.Tensor, below, call(aten.log.default, total)), result_dtype)

    def _normed(self, node: fx.Node, x: fx.Node, result_dtype: torch.dtype, dim: int, span: Span) -> fx.Node:
        """RMS norm or layer norm, from sums over all shards; a shard that several ranks hold counts once."""
        call, inner = self.edit.call, computed_dtype(node)
        share = span.parts / self.world_size / fixed(span.whole)

        def mean(values: fx.Node) -> fx.Node:
            values = call(aten.sum.dim_IntList, self._masked(values, dim, span, 0), [dim], True)
            return call(aten.mul.Scalar, self.reduced(values, "sum"), share)

        epsilon, dtype, x = nodes.argument(node, "eps"), nodes.tensor_type(x).dtype, self._in(x, inner)
        if nodes.is_call(node, aten.layer_norm.default):
            x = call(aten.sub.Tensor, x, mean(x))
        squares = mean(call(aten.mul.Tensor, x, x))
        squares = call(aten.add.Scalar, squares, torch.finfo(dtype).eps if epsilon is None else epsilon)
        normed = call(aten.mul.Tensor, x, call(aten.rsqrt.default, squares))
        if isinstance(weight := nodes.argument(node, "weight"), fx.Node):
            normed = call(aten.mul.Tensor, normed, self._in(weight, inner))
        if nodes.is_call(node, aten.layer_norm.default) and isinstance(bias := nodes.argument(node, "bias"), fx.Node):
            normed = call(aten.add.Tensor, normed, self._in(bias, inner))
        return self._in(normed, result_dtype)

    def _log_sum(self, node: fx.Node, x: fx.Node, result_dtype: torch.dtype, dim: int, span: Span) -> fx.Node:
        call, x = self.edit.call, self._in(x, computed_dtype(node))
        greatest = self.reduced(call(aten.amax.default, self._masked(x, dim, span, -math.inf), [dim], True), "max")
        # A row with maximum -inf or inf is not shifted, which would give NaN.
        greatest = call(aten.masked_fill.Scalar, greatest, call(aten.isinf.default, greatest), 0)
        powers = self._masked(call(aten.exp.default, call(aten.sub.Tensor, x, greatest)), dim, span, 0)
        total = self.reduced(call(aten.sum.dim_IntList, powers, [dim], True), "sum")
        log_sum = self._in(call(aten.add.Tensor, call(aten.log.default, total), greatest), result_dtype)
        return log_sum if nodes.argument(node, "keepdim") else call(aten.squeeze.dim, log_sum, dim)

    def _best(self, node: fx.Node, x: fx.Node, dtype: torch.dtype, dim: int, span: Span) -> tuple[fx.Node, fx.Node]:
        """The largest values and their indices along `dim`, which is kept: the best of each rank's candidates, gathered."""
        call, count = self.edit.call, candidates(node, span)
        x = self._masked(x, dim, span, -math.inf)
        pair = call(aten.max.dim, x, dim, True) if nodes.is_call(node, *BEST) else call(aten.topk.default, x, count, dim)
        best, places = self.edit.item(pair, 0), call(aten.add.Tensor, self.edit.item(pair, 1), self._first(span))
        # [1, 2, …] on each rank, since all-gather concatenates along the first dimension.
        both = call(aten.stack.default, [self._in(best, dtype), call(aten.to.dtype, places, dtype)])
        every = call(WAIT, call(ALL_GATHER, call(aten.unsqueeze.default, both, 0), self.world_size, GROUP))
        candidate_rows = call(
            aten.cat.default, [self.edit.item(call(aten.unbind.int, every), rank) for rank in range(self.world_size)], dim + 1
        )
        best, places = (call(aten.select.int, candidate_rows, 0, at) for at in (0, 1))
        if nodes.is_call(node, *BEST):
            # The first of equal values has the lowest index, since ranks hold a row in order.
            first = call(aten.argmax.default, best, dim, True)
            best, places = call(aten.amax.default, best, [dim], True), call(aten.gather.default, places, dim, first)
        else:
            order = call(aten.sort.stable, best, stable=True, dim=dim, descending=True)
            chosen = call(aten.slice.Tensor, self.edit.item(order, 1), dim, 0, TopK(node).k)
            best, places = call(aten.gather.default, best, dim, chosen), call(aten.gather.default, places, dim, chosen)
            if span.is_padded:
                # Among values of -inf a padded shard may give an index out of range.
                places = call(aten.clamp_max.default, places, fixed(span.whole) - 1)
        return best, call(aten.to.dtype, places, torch.int64)

    def _looked_up(self, node: fx.Node, x: fx.Node, dim: int, span: Span) -> fx.Node:
        """A rank's share of a gather, zeros for the shards of other ranks: a partial sum."""
        call = self.edit.call
        own = call(aten.sub.Tensor, Gather(node).indices, self._first(span))
        held = call(aten.clamp.default, own, 0, fixed(span.local) - 1)
        rows = call(aten.gather.default, x, dim, held)
        return call(aten.masked_fill.Scalar, rows, call(aten.ne.Tensor, own, held), 0)

    def _first(self, span: Span) -> fx.Node:
        """The first index of each rank's shard."""
        local = fixed(span.local)
        starts = [torch.full((), rank * local, dtype=torch.int64) for rank in range(self.world_size)]
        return self.own(f"rank.first_row_{span.whole}by{span.parts}x{local}", starts)

    def _masked(self, x: fx.Node, dim: int, span: Span | Spans, value: float) -> fx.Node:
        """The value, with padding of a shard replaced."""
        spans = (span,) if isinstance(span, Span) else span
        if not any(span.is_padded for span in spans):
            return x
        behind = nodes.tensor_type(x).rank - dim - 1
        missing = [(indices_of(spans, rank) < 0).reshape(-1, *[1] * behind) for rank in range(self.world_size)]
        stretches = "_".join(f"{span.outer}x{span.size}x{span.inner}by{span.parts}e{span.every}" for span in spans)
        mask = self.own(f"rank.is_filled_{stretches}_{behind}", missing)
        return self.edit.call(aten.masked_fill.Scalar, x, mask, value)

    def _in(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        return x if nodes.tensor_type(x).dtype == dtype else self.edit.call(aten.to.dtype, x, dtype)

    def quantize(self, node: fx.Node, spans: Spans) -> fx.Node:
        """Dynamic quantization with the range of all shards, per-token or per-tensor. Every range contains 0, as padding is."""
        x = nodes.operand(node)
        rank = nodes.tensor_type(x).rank
        x = self._masked(x, rank - 1, spans, 0)
        per_token = nodes.argument(node, "granularity") == "token"
        dims = [-1] if per_token else [*range(rank)]
        form = FORMATS[str(node.kwargs["format"])]
        call: Callable[..., fx.Node] = self.edit.call
        least = call(aten.neg.default, call(aten.amin.default, x, dims, True))
        ends = call(aten.cat.default, [least, call(aten.amax.default, x, dims, True)], -1)
        ends = call(aten.clamp_min.default, call(aten.to.dtype, self.reduced(ends, "max"), torch.float32), 0)
        below, high = (call(aten.slice.Tensor, ends, -1, at, at + 1) for at in (0, 1))
        if not per_token:
            below, high = (call(aten.reshape.default, end, []) for end in (below, high))
        zero_point = None
        if form.symmetric:
            scale = call(aten.div.Tensor, call(aten.maximum.default, below, high), form.high)
        else:
            scale = call(aten.div.Tensor, call(aten.add.Tensor, high, below), form.high - form.low)
        scale = call(aten.clamp_min.default, scale, LEAST)
        if not form.symmetric:
            zero_point = call(aten.add.Tensor, call(aten.div.Tensor, below, scale), form.low)
            zero_point = call(aten.clamp.default, call(aten.round.default, zero_point), form.low, form.high)
        return call(torch.ops.lissom.fake_quantize.default, x, scale, zero_point, format=form.name)
