"""Quantize the KV cache to int8 or int4, with a scale per token and head.

    s = max|x| / 127,  q = round(x / s)   written   |   x ≈ q · s   read

x: a token's key or value in one head, [head_dim]. A token is quantized once, when it is written, so errors do not accumulate
over a text. A key of 128 features takes 132 bytes rather than 512, or 68 in int4. Linear layers are left to `quantize`.

Sheng et al. 2023, FlexGen, quantize groups of neighbours instead; Liu et al. 2024, KIVI, find that keys lose less when they are
quantized per channel, over several tokens, which requires the last tokens in full precision. On a CPU, attention reads int8
directly; int4 is dequantized first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from lissom.compiler.analysis.structure.kv_cache import written_rows
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.view_calls import IndexCopy
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.ops.formats import FORMATS, LEAST, Format, pack_halves
from lissom.ops.quantization import dequantize

aten = torch.ops.aten
_END = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class QuantizeCache(Approximation):
    """Quantizes the KV cache to int8 or int4.

    Attributes:
        bits: 8 or 4 per element.
    """

    bits: Literal[8, 4] = 8

    def run(self, edit: Editor) -> None:
        form = FORMATS[f"int{self.bits}"]
        before = after = 0
        for write in edit.nodes(aten.copy_.default):
            new = written_rows(write)
            if new is not None and edit.may_change(write, self._obstacle(write, new)):
                before += edit.tensor(new.x).nbytes
                after += sum(held.nbytes for held in _quantize_state(edit, new, write, form))
        if before:
            edit.note(f"the cache takes {after / 1e6:.3g} MB, and took {before / 1e6:.3g} MB")
        else:
            edit.note("the program has no KV cache; compile_generation makes one that has")

    def _obstacle(self, write: fx.Node, new: IndexCopy) -> str | None:
        """The reason a write to the cache is left unchanged; None if it can be quantized."""
        if write.users or set(new.x.users) != {new.node, write}:
            return f"'{new.x.target}' has other readers"
        if self.bits == 4 and nodes.fixed_size(new.x, -1) % 2:
            return f"'{new.x.target}' has an odd number of features, and int4 packs two per byte"
        return None


def _quantize_state(edit: Editor, new: IndexCopy, write: fx.Node, form: Format) -> Sequence[torch.Tensor]:
    """Replace the state by integers and scales; returns both."""
    name = str(new.x.target)
    held = quantize_rows(edit.program.weight(name), form)
    dtype = nodes.tensor_type(new.node).dtype
    with edit.before(new.node):
        reads = edit.exchange_state(new.x, {f"{name}_{form.name}": held[0], f"{name}_scale": held[1]})
        written = [
            edit.call(aten.index_copy.default, read, new.dim, new.indices, part)
            for read, part in zip(reads, _quantized(edit, new.source, form), strict=True)
        ]
        value = edit.call(dequantize, *written, format=form.name, dtype=dtype)
    with edit.before(write):
        for read, part in zip(reads, written, strict=True):
            edit.call(aten.copy_.default, read, part)
    edit.program.graph.erase_node(write)
    edit.replace(new.node, value)
    return held


def _quantized(edit: Editor, rows: fx.Node, form: Format) -> tuple[fx.Node, fx.Node]:
    """Integers and per-token, per-head scales of [batch, heads, tokens, features]."""
    if nodes.tensor_type(rows).dtype != torch.float32:
        rows = edit.call(aten.to.dtype, rows, torch.float32)
    largest = edit.call(aten.amax.default, edit.call(aten.abs.default, rows), [-1], True)
    scale = edit.call(aten.clamp_min.default, edit.call(aten.mul.Tensor, largest, 1.0 / form.high), LEAST)
    whole = edit.call(aten.round.default, edit.call(aten.div.Tensor, rows, scale))
    whole = edit.call(aten.clamp.default, whole, form.low, form.high)
    if form.bits == 8:
        return edit.call(aten.to.dtype, whole, form.storage), scale
    # Two's complement in four bits: -1 is 15.
    halves = edit.call(aten.to.dtype, edit.call(aten.remainder.Scalar, whole, 16.0), form.storage)
    low, high = (edit.call(aten.slice.Tensor, halves, -1, start, _END, 2) for start in (0, 1))
    return edit.call(aten.add.Tensor, low, edit.call(aten.mul.Tensor, high, 16)), scale


def quantize_rows(x: torch.Tensor, form: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers of x, [..., features] or half as many packed, and its scales, [..., 1], quantized as new rows are."""
    x = x.detach().float()
    scale = (x.abs().amax(-1, keepdim=True) * (1.0 / form.high)).clamp_min(LEAST)
    whole = (x / scale).round().clamp(form.low, form.high).to(torch.int8)
    # Rows not written yet stay zero, and an artifact stores no zero state.
    return (pack_halves(whole) if form.bits == 4 else whole), scale.where(scale > LEAST, 0.0)
