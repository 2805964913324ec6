"""Lower attention with a mask that is a pattern of positions to a kernel that skips hidden keys.

    attention(q, k, v, pattern(i, j) ∧ rest)   ->  lissom::block_sparse_attention(q, k, v, rest, pattern)
    attention(q, k, v, (j ≤ i) ∧ rest)         ->  lissom::fused_attention(q, k, v, rest, causal)

The pattern is read from the operators that compute the mask, so the sliding windows of models (Mistral, Gemma, ModernBERT,
GPT-Neo, GPT-OSS, Llama 4 …) are found like those of `sparsify-attention`. The rest of the mask, such as padding, is small; the
mask of size queries × keys is no longer computed.

A sparse kernel is slower than a dense one where little is hidden. Both are timed at increasing lengths until the sparse one
wins, and an attention is lowered where the program's lengths, the example's or the longest, reach that length. On a CPU the
kernel computes a window as dense attention over the keys that each row sees, which is never slower, and is not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median

import sympy
import torch
from torch import fx

from lissom.compiler.analysis.cost import example_shape
from lissom.compiler.analysis.patterns.reader import Reading, read_pattern, write_rest
from lissom.compiler.analysis.structure.linear import as_int
from lissom.compiler.analysis.structure.operands import mask_of, operands_obstacle, scale_of, shared_operands, sinks_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import ATTENTIONS
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.measure.timing import time_runs
from lissom.ops.block_sparse_attention import block_sparse_attention
from lissom.ops.fused_attention import fused_attention
from lissom.ops.native import load_kernels, missing_kernel
from lissom.ops.pattern import Pattern

aten = torch.ops.aten

_PLAIN = aten.scaled_dot_product_attention.default
_SECONDS = 2.0
"""Seconds of timing of the two kernels in all, for equal attentions."""
_REPEATS = 3
_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
"""The lengths that are timed, in tokens."""
_BLOCK = 64
"""Tokens per block of queries and of keys in the kernels."""
_GAIN = 0.95
"""The sparse kernel must take less than this share of the dense one's time, so that noise does not decide."""


@dataclass(frozen=True)
class _Shape:
    """The properties that the time of an attention depends on, except its length."""

    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    softcap: bool


@dataclass(frozen=True)
class LowerSparseAttention(Rewrite):
    """Lowers attention with a sparse pattern to a kernel that skips hidden keys, where that is measured faster.

    Attributes:
        always: lowers without measuring, also where there is no kernel and the reference runs.
        causal: also lowers causal attention with another mask, to the dense CPU kernel.
    """

    always: bool = False
    causal: bool = True

    def run(self, edit: Editor) -> None:
        known: dict[object, tuple[int | None, str]] = {}
        # All masks are read before the first is removed.
        readings = {node: read_pattern(edit.program, node) for node in edit.nodes(*ATTENTIONS)}
        for node, reading in readings.items():
            edit.current = node
            if reading.pattern is None:
                if reading.reason:
                    edit.skip(node, reading.reason)
                continue
            if reading.causal and (mask_of(node) is None or not (self.causal or _takes_causality(node, reading))):
                continue
            reason = operands_obstacle(edit, node)
            if reason is None and not self.always:
                if reading.causal:
                    reason = None if _takes_causality(node, reading) else _missing(node, fused_attention)
                else:
                    reason = self._loss(edit, node, reading, known)
            if edit.may_change(node, reason):
                _lower(edit, node, reading)

    def _loss(self, edit: Editor, node: fx.Node, reading: Reading, known: dict[object, tuple[int | None, str]]) -> str | None:
        """The reason a sparse kernel would gain nothing; None if it gains."""
        missing = _missing(node, block_sparse_attention)
        if missing is not None:
            return missing
        assert reading.pattern is not None
        if reading.pattern.band is not None and nodes.tensor_type(node).device.type == "cpu":
            return None
        longest, shape = _longest(edit, node), _shape(node)
        key = (shape, reading.pattern, longest, None if reading.layout is None else reading.layout.data_ptr())
        if key not in known:
            lengths = [
                length for length in (*_LENGTHS, longest or 0) if 0 < length <= min(longest or _LENGTHS[-1], _LENGTHS[-1])
            ]
            hiding = [length for length in sorted({*lengths}) if hides(reading.pattern, length, reading.layout)]
            known[key] = crossing(partial(_timings, shape, reading.pattern, reading.layout), hiding)
            edit.note(f"{nodes.origin(node).module_path or node.name}: {known[key][1]}")
        return known[key][1] if known[key][0] is None else None


def hides(pattern: Pattern, tokens: int, layout: torch.Tensor | None) -> bool:
    """True if the pattern hides more blocks at that length than a causal mask."""
    some, _ = pattern.blocks(tokens, tokens, _BLOCK, layout)
    plain = some.any(0).triu(1).any() or tokens <= _BLOCK
    return not bool(some.all()) if plain else bool((~some).tril().any())


def _takes_causality(node: fx.Node, reading: Reading) -> bool:
    """True if PyTorch's operator can take the causal mask as a flag: if the mask is nothing but causal."""
    return node.target is _PLAIN and not reading.rest


def _missing(node: fx.Node, target: torch._ops.OpOverload) -> str | None:
    """The reason there is no kernel of an operator for this attention; None if there is one."""
    q = nodes.tensor_type(Attention(node).q)
    if q.device.type == "cpu":
        reason = missing_kernel(q.dtype, q.device)
        if reason is not None:
            return reason
        load_kernels()
    if torch._C._dispatch_has_kernel_for_dispatch_key(target._schema.name, q.device.type.upper()):
        return None
    return f"there is no kernel of {target._schema.name} for {q.device.type}"


def _longest(edit: Editor, node: fx.Node) -> int | None:
    """The most tokens the attention may be given; None where nothing bounds them."""
    k = Attention(node).k
    size = nodes.tensor_type(k).shape[2]
    if isinstance(size, int):
        return size
    dimension = edit.program.signature.dimensions.get(size) if isinstance(size, sympy.Symbol) else None
    if dimension is None or dimension.maximum is None:
        return None
    return max(dimension.maximum, example_shape(k)[2])


def _shape(node: fx.Node) -> _Shape:
    q, k, v = (nodes.tensor_type(operand) for operand in (Attention(node).q, *shared_operands(node)))
    heads, groups, head_dim, value_dim = map(as_int, (q.shape[1], k.shape[1], q.shape[3], v.shape[3]))
    return _Shape(heads, groups, head_dim, value_dim, q.dtype, q.device, bool(node.kwargs.get("softcap")))


def crossing(time_at: Callable[[int], tuple[float, float]], lengths: Sequence[int]) -> tuple[int | None, str]:
    """The first of these lengths at which the sparse kernel is faster, None for none, and a sentence that says so.

    Args:
        time_at: the seconds of the dense and of the sparse kernel at a length.
        lengths: in tokens, increasing.
    """
    began = time.perf_counter()
    before = ""
    for length in lengths:
        dense, sparse = time_at(length)
        told = f"{1e3 * dense:.3g} ms dense, {1e3 * sparse:.3g} ms sparse at {length:,} tokens"
        if sparse < _GAIN * dense:
            return length, f"sparse is faster from about {length:,} tokens on ({before}{told})"
        before = f"{told}; "
        if time.perf_counter() - began > _SECONDS / 4:
            break
    if before:
        return None, f"dense is faster at all lengths tried ({before.removesuffix('; ')})"
    return None, "its pattern hides no block of texts as long as it may be given"


def _timings(shape: _Shape, pattern: Pattern, layout: torch.Tensor | None, tokens: int) -> tuple[float, float]:
    """Median seconds of the dense kernel, including its mask, and of the sparse one."""
    with torch.inference_mode(), torch.cuda.device(shape.device) if shape.device.type == "cuda" else nullcontext():
        heads = (shape.heads, shape.head_dim), (shape.key_heads, shape.head_dim), (shape.key_heads, shape.value_dim)
        q, k, v = (torch.randn(1, tokens, *sizes, dtype=shape.dtype, device=shape.device).transpose(1, 2) for sizes in heads)
        mask = pattern.mask(tokens, tokens, layout).to(shape.device)[None]
        scale, softcap = shape.head_dim**-0.5, 30.0 if shape.softcap else 0.0
        if shape.device.type == "cpu":
            dense = partial(fused_attention, q, k, v, mask, scale=scale, softcap=softcap)
        else:
            dense = partial(_PLAIN, q, k, v, mask, scale=scale, enable_gqa=shape.heads != shape.key_heads)
        options = {"pattern": pattern.encode(), "block": pattern.block, "scale": scale, "softcap": softcap}
        sparse = partial(block_sparse_attention, q, k, v, None, layout, **options)
        return _seconds(dense), _seconds(sparse)


def _seconds(run: Callable[[], object]) -> float:
    times = time_runs({"run": run}, _SECONDS / 8, most=_REPEATS + 1)["run"]
    # The first run allocates memory and compiles.
    return median(times[1:] or times) / 1e3


def _lower(edit: Editor, node: fx.Node, reading: Reading) -> None:
    """Replace the attention with the sparse operator, or for a causal mask with the fused one."""
    assert reading.pattern is not None
    q, (k, v) = Attention(node).q, shared_operands(node)
    sinks, softcap = sinks_of(node), node.kwargs.get("softcap")
    options = {key: value for key, value in (("softcap", softcap), ("sinks", sinks)) if value}
    with edit.before(node):
        rest = write_rest(edit, reading.rest)
        if reading.causal and _takes_causality(node, reading):
            grouped = {"enable_gqa": True} if nodes.argument(node, "enable_gqa") or k is not Attention(node).k else {}
            call = edit.call(_PLAIN, q, k, v, None, 0.0, True, scale=scale_of(node), **grouped)
        elif reading.causal:
            call = edit.call(fused_attention, q, k, v, rest, scale=scale_of(node), causal=True, **options)
        else:
            name = f"{nodes.origin(node).module_path}.blocks".removeprefix(".")
            layout = None if reading.layout is None else edit.weight(name, reading.layout)
            pattern = reading.pattern
            call = edit.call(
                block_sparse_attention, q, k, v, rest, layout,
                pattern=pattern.encode(), block=pattern.block, scale=scale_of(node), **options,
            )  # fmt: skip
    edit.replace(node, call)
