"""The attention of a decoder in the form to which a KV cache can be added: causal, maybe with a sliding window, no mask.

The attention mask of the call is taken to hide nothing; the decoder's own mask hides padding, where it has one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.patterns.reader import Reading, read_pattern
from lissom.compiler.analysis.structure.operands import operands_obstacle, scale_of, shared_operands, sinks_of, softcap_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import ATTENTIONS, CONVERSIONS
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.export.causal_lm.names import ATTENTION_MASK
from lissom.ops.block_sparse_attention import block_sparse_attention
from lissom.ops.pattern import UNBOUNDED, Pattern

aten = torch.ops.aten


@dataclass(frozen=True)
class UnpadText(Approximation):
    """Takes ones in place of the attention mask: a text without padding."""

    def run(self, edit: Editor) -> None:
        given = zip(edit.program.placeholders, edit.program.signature.tensors, strict=True)
        mask = next((node for node, leaf in given if leaf.path == ATTENTION_MASK), None)
        if mask is None:
            return
        for reader in [user for user in mask.users if user.target is not aten.sym_size.int]:
            with edit.before(reader):
                if nodes.is_tensor(reader) and nodes.is_call(reader, *CONVERSIONS):
                    edit.replace(reader, edit.call(aten.ones_like.default, mask, dtype=nodes.tensor_type(reader).dtype))
                else:
                    reader.replace_input_with(mask, edit.call(aten.ones_like.default, mask))


@dataclass(frozen=True)
class UnmaskAttention(Approximation):
    """Replaces each causal attention with one that has its pattern of positions, and no mask; others stay."""

    def run(self, edit: Editor) -> None:
        # All masks are read before the first is removed.
        readings = {node: read_pattern(edit.program, node) for node in edit.nodes(*ATTENTIONS)}
        for node, reading in readings.items():
            if edit.may_change(node, _obstacle(edit, node, reading)):
                _unmask(edit, node, reading)


def window_of(pattern: Pattern) -> int | None:
    """The tokens that a query of a causal attention sees, itself included; None for all before it.

    Raises:
        ValueError: for another pattern.
    """
    if pattern.band is None or pattern.band[1] != 0:
        raise ValueError(f"{pattern} is neither causal nor a causal sliding window")
    low, _ = pattern.band
    return None if low <= -UNBOUNDED else 1 - low


def _obstacle(edit: Editor, node: fx.Node, reading: Reading) -> str | None:
    """The reason why an attention cannot have a KV cache; None if it can."""
    if reading.pattern is None:
        return reading.reason or "it sees later tokens"
    if reading.pattern.band is None or reading.pattern.band[1] != 0 or reading.layout is not None:
        return "its mask is neither causal nor a causal sliding window"
    if sinks_of(node) is not None:
        return "it has attention sinks"
    if reading.rest:
        return "its mask depends on more than positions"
    q, v = (nodes.tensor_type(operand) for operand in (Attention(node).q, Attention(node).v))
    if q.rank == v.rank == 4 and q.shape[3] != v.shape[3]:
        return f"its keys have {q.shape[3]} features and its values {v.shape[3]}"
    return operands_obstacle(edit, node)


def _unmask(edit: Editor, node: fx.Node, reading: Reading) -> None:
    assert reading.pattern is not None
    (k, v), pattern, softcap = shared_operands(node), reading.pattern, softcap_of(node)
    options: dict[str, object] = {"softcap": softcap} if softcap else {}
    with edit.before(node):
        call = edit.call(
            block_sparse_attention,
            *(Attention(node).q, k, v),
            pattern=pattern.encode(),
            block=pattern.block,
            scale=scale_of(node),
            **options,
        )
    edit.replace(node, call)
