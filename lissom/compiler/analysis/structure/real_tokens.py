"""The real tokens of a sample, without padding, according to the program's attention masks.

An input's name is not enough: the ones of a `mask` may be kept or masked, or the mask may be added to the scores. When no
input is a padding mask whose zeros mask keys, the attention's mask is computed from the sample.

The padding mask of a program with a KV cache is of the cache's slots. Samples are read into an empty cache, so the first slots
are the sample's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import is_attention
from lissom.compiler.analysis.structure.masks import HIDDEN, values_at
from lissom.compiler.analysis.structure.operands import mask_of
from lissom.compiler.analysis.structure.padding import kept_rows, order_of, padding_masks
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.interpreter import REFUSALS
from lissom.compiler.ir.operators import GROUPED_PRODUCTS
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.ir.signature import TensorArgument
from lissom.compiler.ir.types import Size

_HIDDEN_ROUNDED = 0.99 * HIDDEN
"""-1e4 is -9984 in bfloat16."""


def token_mask(program: Program, sample: Sample, node: fx.Node, axis: int = 1) -> torch.Tensor | None:
    """The real tokens of the node's tensor, as booleans in the shape of its batch and tokens; None if all are real.

    In a row without real tokens, all count as real. Rows sorted by expert are in another order than the masks: all count.

    Args:
        axis: the dimension of the tokens, the second to last.
    """
    if any(call.target in GROUPED_PRODUCTS for call in (node, *node.users)):
        return None
    shape = nodes.tensor_type(node).shape
    for batch, tokens, real in program.fact(_sources).of(program, sample):
        if len(shape) == axis + 2 and (shape[0], shape[axis]) == (batch, tokens):
            return real
        if len(shape) == 2 and shape[0] == batch * tokens:
            return real.flatten()
    return None


def real_positions(program: Program, sample: Sample) -> Sequence[tuple[Size, Size, torch.Tensor]]:
    """For each mask that shows padding: the sizes of batch and tokens, and which tokens are real, [batch, tokens]."""
    return program.fact(_sources).of(program, sample)


@dataclass
class _Sources:
    """The inputs and masks that show which tokens are real.

    Attributes:
        inputs: indices of inputs whose zeros mask keys.
        masks: attention masks computed from other inputs, each with the nodes it depends on, in order.
        named: indices of inputs with `mask` in their name that no recognized attention mask depends on.
    """

    inputs: list[int]
    masks: dict[fx.Node, list[fx.Node]]
    named: list[int]
    _sample: Sample | None = None
    _real: list[tuple[Size, Size, torch.Tensor]] = field(default_factory=list["tuple[Size, Size, torch.Tensor]"])

    def of(self, program: Program, sample: Sample) -> list[tuple[Size, Size, torch.Tensor]]:
        """The real tokens of this sample, with the sizes of batch and tokens."""
        if self._sample is not sample:
            self._sample, self._real = sample, list(self._read(program, sample))
        return self._real

    def _read(self, program: Program, sample: Sample) -> Iterator[tuple[Size, Size, torch.Tensor]]:
        leaves = program.signature.tensors
        for at in self.inputs:
            batch, tokens = leaves[at].type.shape
            if program.state:
                yield from _of_first_slots(leaves, sample, at)
            yield batch, tokens, kept_rows(sample[at])
        for mask, order in self.masks.items():
            shape = nodes.tensor_type(mask).shape
            # A mask that cannot be computed from the sample shows nothing.
            with suppress(*REFUSALS):
                yield shape[0], shape[-1], _seen(program, mask, order, sample)
        for at in self.named:
            value = sample[at]
            added = value.is_floating_point() and bool((value < 0).any())
            batch, tokens = leaves[at].type.shape
            yield batch, tokens, kept_rows(value == 0 if added else value)


def _of_first_slots(leaves: Sequence[TensorArgument], sample: Sample, at: int) -> Iterator[tuple[Size, Size, torch.Tensor]]:
    """The real tokens by a mask of slots, for the inputs [batch, tokens] that are no masks of slots themselves."""
    batch, slots = leaves[at].type.shape
    for leaf, given in zip(leaves, sample, strict=True):
        if leaf.type.rank == 2 and leaf.type.shape[0] == batch and leaf.type.shape[1] != slots:
            yield batch, leaf.type.shape[1], kept_rows(sample[at][:, : given.shape[1]])


def _sources(program: Program) -> _Sources:
    placeholders = program.placeholders
    known = program.fact(padding_masks)
    masks = dict.fromkeys(mask for node in program.nodes() if is_attention(node) and (mask := mask_of(node)) is not None)
    computed = {mask: order for mask in masks if (order := order_of([mask])) is not None}
    told = {
        mask: order
        for mask, order in computed.items()
        if nodes.tensor_type(mask).rank == 4 and any(node.op == "placeholder" and node not in known for node in order)
    }
    named = [
        at
        for at, leaf in enumerate(program.signature.tensors)
        if "mask" in leaf.path and leaf.type.rank == 2 and not any(placeholders[at] in order for order in computed.values())
    ]
    return _Sources([placeholders.index(node) for node in known], told, named)


def _seen(program: Program, mask: fx.Node, order: Sequence[fx.Node], sample: Sample) -> torch.Tensor:
    """The keys visible to some query, [batch, keys].

    Args:
        mask: of an attention, [batch or 1, heads or 1, queries, keys].
    """
    given = dict(zip(program.placeholders, sample, strict=True))
    value = values_at(program, order, program.signature.sizes_of(sample), given)[mask]
    seen = value if value.dtype == torch.bool else value > _HIDDEN_ROUNDED
    return kept_rows(seen.flatten(1, -2).any(1))
