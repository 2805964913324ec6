"""Weights in the form in which a file stores them, kept next to the floating-point weights of a model.

A weight that was read from blocks carries its `StoredWeight`; so does the weight of a program that shares its memory.
`use-stored-weights` reads it. The blocks are mapped from the file, so they take no memory until they are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from lissom.ops.gguf_blocks import BlockType, StoredBlocks, unpack_blocks

Kept = TypeVar("Kept", bound=torch.Tensor)
_ATTRIBUTE = "_lissom_stored"


@dataclass(frozen=True)
class StoredWeight:
    """A weight in the blocks of a file.

    Attributes:
        blocks: the bytes, uint8.
        rows: of the stored matrix.
        columns: of the stored matrix.
        order: the stored row of each row of the weight; None where they are the same.
        transposed: whether the weight is [columns, rows].
    """

    blocks: torch.Tensor
    kind: BlockType
    rows: int
    columns: int
    order: torch.Tensor | None = None
    transposed: bool = False

    def unpack(self) -> StoredBlocks:
        """The integers and scales, their rows in the order of the weight's, but not transposed."""
        unpacked = unpack_blocks(self.blocks, self.kind, self.rows, self.columns)
        if self.order is None:
            return unpacked
        zero_point = None if unpacked.zero_point is None else unpacked.zero_point[self.order]
        return StoredBlocks(unpacked.q[self.order], unpacked.scale[self.order], zero_point, unpacked.format)


def keep_stored(tensor: Kept, stored: StoredWeight | None) -> Kept:
    """The tensor, which remembers in what form a file stores its values."""
    if stored is not None:
        setattr(tensor, _ATTRIBUTE, stored)
    return tensor


def stored_form(tensor: torch.Tensor) -> StoredWeight | None:
    """The form in which a file stores these values; None where that is not known."""
    return getattr(tensor, _ATTRIBUTE, None)
