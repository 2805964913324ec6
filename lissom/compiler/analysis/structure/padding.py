"""Finds the padding mask among a program's inputs by computing the masks that depend on it.

A padding mask is an input [batch, tokens] whose zeros mask keys in attention. The parts of a program that compute masks and
positions are small; they are run here on many masks: full, padded on either side, with holes, and empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import sympy
import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import is_attention, is_linear
from lissom.compiler.analysis.structure.masks import HIDDEN, Values, dependencies, is_size, mask_kind, values_at
from lissom.compiler.analysis.structure.operands import mask_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.interpreter import REFUSALS
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.signature import evaluate

_BATCH, _TOKENS = 8, 9
"""Sizes of the probes, unless a program fixes or bounds them: a row for each kind of mask, and an odd number of tokens."""

Check = Callable[[Values], bool]


def padding_masks(program: Program) -> tuple[fx.Node, ...]:
    """The inputs [batch, tokens] whose zeros mask keys in an attention; use it as `program.fact(padding_masks)`."""
    types = {node: nodes.tensor_type(node) for node in program.placeholders}
    candidates = [node for node, tensor_type in types.items() if tensor_type.rank == 2 and not tensor_type.dtype.is_complex]
    masks = dict.fromkeys(mask for node in program.nodes() if is_attention(node) and (mask := mask_of(node)) is not None)
    return tuple(
        candidate
        for candidate in candidates
        if any(
            holds(program, candidate, [mask], partial(_mask_hides, mask, candidate)) and _has_effect(program, mask, candidate)
            for mask in masks
        )
    )


@dataclass(frozen=True)
class KeyMask:
    """The masked keys: later ones with `causal`, and those where the input `padding`, [batch, tokens], is zero."""

    causal: bool = False
    padding: fx.Node | None = None


def key_mask(program: Program, attention: fx.Node) -> KeyMask | None:
    """An attention's mask as causal and padding masks, if it is the same for all real queries; None for any other mask.

    A mask that depends on the values of an input other than a padding mask is never one of these.
    """
    mask, kind = mask_of(attention), mask_kind(program, attention)
    if mask is None:
        return KeyMask(kind.causal)
    if kind.bias or kind.window is not None:
        return None
    order = order_of([mask])
    if order is None:
        return None
    read = [node for node in order if node.op == "placeholder"]
    if len(read) > 1:
        return None
    padding = read[0] if read and read[0] in program.fact(padding_masks) else None
    if read and padding is None:
        return None
    for causal in (False, True):
        check = partial(_hides_no_more, mask, padding, causal)
        if _holds_on(check, order, program, padding):
            return KeyMask(causal, padding)
    return None


def _hides_no_more(mask: fx.Node, padding: fx.Node | None, causal: bool, values: Values) -> bool:
    """True when, for the real queries, the mask equals the padding and causal masks, and adds no bias."""
    value = values[mask]
    if not 2 <= value.dim() <= 4:
        return False
    value = value[(None,) * (4 - value.dim())]
    hidden = _hidden(value)
    queries, keys = value.shape[-2:]
    if (causal and queries != keys) or (value.dtype != torch.bool and bool(value[~hidden].any())):
        return False
    kept = torch.ones(value.shape[0], keys, dtype=torch.bool, device=value.device) if padding is None else values[padding] != 0
    if kept.shape[1] != keys or value.shape[0] not in (1, len(kept)):
        return False
    wanted = ~kept[:, None, None, :]
    if causal:
        wanted = wanted | torch.ones(queries, keys, dtype=torch.bool, device=value.device).triu(1)
    looked_at = kept[:, None, :, None] if queries == keys else kept.any(1)[:, None, None, None]
    return not bool(((hidden != wanted) & looked_at).any())


def kept_rows(mask: torch.Tensor) -> torch.Tensor:
    """True for real tokens, [batch, tokens]; for all in a fully masked row, since attention there sees all keys."""
    real = mask != 0
    return real | ~real.any(1, keepdim=True)


def _has_effect(program: Program, mask: fx.Node, candidate: fx.Node) -> bool:
    """True when a zero of the candidate masks a key that is visible without it: a mask in which each token sees only itself
    masks all other keys for any input.
    """
    order = order_of([candidate, mask]) or ()
    without = _hidden(values_at(program, order, _probe_sizes(program, candidate))[mask])  # inputs are ones
    return any(
        bool((_hidden(values[mask]) & ~without & (values[candidate] == 0)[:, None, None, :]).any())
        for values in _probes(program, candidate, order)
    )


def _hidden(mask: torch.Tensor) -> torch.Tensor:
    """The masked pairs, [batch or 1, heads or 1, queries, keys]."""
    return (~mask if mask.dtype == torch.bool else mask <= HIDDEN)[(None,) * (4 - mask.dim())]


def _mask_hides(mask: fx.Node, candidate: fx.Node, values: Values) -> bool:
    kept = kept_rows(values[candidate])
    return hides(values[mask], kept, own=values[mask].shape[-2:] == (kept.shape[1],) * 2)


def hides(mask: torch.Tensor, kept: torch.Tensor, *, own: bool) -> bool:
    """True when the mask masks every key that is not kept, for every query or for every query that is kept.

    Args:
        mask: broadcast to [batch, heads, queries, keys].
        kept: [batch, tokens].
        own: whether the queries are the same tokens.
    """
    if not 2 <= mask.dim() <= 4 or mask.shape[-1] != kept.shape[1] or (mask.dim() == 4 and mask.shape[0] not in (1, len(kept))):
        return False
    wanted = ~kept[:, None, None, :]
    if own:
        wanted = wanted & kept[:, None, :, None]
    return bool((_hidden(mask) | ~wanted).all())


def zero_where_hidden(value: torch.Tensor, kept: torch.Tensor, place: tuple[int, int], rank: int) -> bool:
    """True when the value, broadcast to a tensor of this rank, is zero or False at every position that is not kept.

    Args:
        place: the dimensions of batch and tokens.
    """
    value = value[(None,) * (rank - value.dim())]
    rows = value.movedim(place, (0, 1)).flatten(2).ne(0).any(-1) if rank > 2 else value.ne(0)
    return not bool((rows.expand(kept.shape) & ~kept).any())


def holds(program: Program, mask: fx.Node, wanted: Sequence[fx.Node], check: Check) -> bool:
    """True when the check holds for the values of `wanted` and of the mask on all probes; False when there are no probes."""
    order = order_of([mask, *wanted])
    return order is not None and mask in order and _holds_on(check, order, program, mask)


def _holds_on(check: Check, order: Sequence[fx.Node], program: Program, mask: fx.Node | None) -> bool:
    try:
        return all(check(values) for values in _probes(program, mask, order))
    # A part of a program that cannot run on a probe shows nothing.
    except REFUSALS:
        return False


def order_of(wanted: Sequence[fx.Node]) -> list[fx.Node] | None:
    """The nodes that these nodes depend on, in order; None when linear layers or attentions are among them."""
    return dependencies(wanted, lambda node: is_linear(node) or is_attention(node), lambda node: not is_size(node))


def _patterns(tokens: int) -> torch.Tensor:
    """Masks to probe with: [_BATCH, tokens] of booleans."""
    rows = torch.ones(_BATCH, tokens, dtype=torch.bool)
    rows[0, (tokens + 1) // 2 :] = False
    rows[1, 1:] = False
    rows[2, : tokens // 2] = False
    rows[3, :-1] = False
    rows[4] = torch.rand(tokens, generator=torch.Generator().manual_seed(0)) > 0.5
    rows[5] = False
    rows[6, -1:] = False
    return rows


def _probes(program: Program, mask: fx.Node | None, order: Sequence[fx.Node]) -> Iterator[Values]:
    """The values for every probe mask, or once when there is no mask."""
    sizes = _probe_sizes(program, mask)
    if mask is None:
        yield values_at(program, order, sizes)
        return
    batch, tokens = (evaluate(size, sizes) for size in nodes.tensor_type(mask).shape)
    rows = _patterns(tokens)[torch.arange(-(-_BATCH // batch) * batch) % _BATCH]
    for group in rows.split(batch):
        mask_type = nodes.tensor_type(mask)
        yield values_at(program, order, sizes, {mask: group.to(mask_type.device, mask_type.dtype)})


def _probe_sizes(program: Program, mask: fx.Node | None) -> dict[sympy.Symbol, int]:
    sizes: dict[sympy.Symbol, int] = {}
    shape = () if mask is None else nodes.tensor_type(mask).shape
    for index, (symbol, dimension) in enumerate(program.signature.dimensions.items()):
        # Independent sizes get different values.
        size = max(_BATCH if symbol in shape[:1] else _TOKENS + index, dimension.minimum)
        sizes[symbol] = min(size, dimension.maximum or size)
    return sizes
