"""Weights in the form in which a file stores them, kept next to the floating-point weights of a model.

A weight that was read from blocks carries its `StoredWeight`, one of a quantized checkpoint its `PackedWeight`; so does the
weight of a program that shares its memory. `use-stored-weights` reads it. Blocks and packed integers are mapped from the file,
so they take no memory until they are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

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
    column_order: None = None
    rounds_input: bool = False

    @property
    def name(self) -> str:
        """The type of its blocks."""
        return self.kind.name

    @property
    def format(self) -> str:
        """The name in FORMATS that holds its integers."""
        return self.kind.format

    def unpack(self) -> StoredBlocks:
        """The integers and scales, their rows in the order of the weight's, but not transposed."""
        unpacked = unpack_blocks(self.blocks, self.kind, self.rows, self.columns)
        if self.order is None:
            return unpacked
        zero_point = None if unpacked.zero_point is None else unpacked.zero_point[self.order]
        return StoredBlocks(unpacked.q[self.order], unpacked.scale[self.order], zero_point, unpacked.format)


@dataclass(frozen=True)
class PackedWeight:
    """A weight of a quantized checkpoint, [rows, columns].

    Attributes:
        name: how it is stored, for a sentence: `int4 in groups of 128`.
        format: the name in FORMATS that holds its elements.
        read: the elements, scales and zero points, computed from the tensors of the file.
        column_order: the weight's column at each stored column; None where they are the same.
        rounds_input: the checkpoint quantizes the layer's input too.
    """

    name: str
    format: str
    rows: int
    columns: int
    read: Callable[[], StoredBlocks]
    column_order: torch.Tensor | None = None
    rounds_input: bool = False
    transposed: bool = False

    def unpack(self) -> StoredBlocks:
        """The elements, scales and zero points, in the order of the stored columns."""
        return self.read()


Stored = StoredWeight | PackedWeight


def keep_stored(tensor: Kept, stored: Stored | None) -> Kept:
    """The tensor, which remembers in what form a file stores its values."""
    if stored is not None:
        setattr(tensor, _ATTRIBUTE, stored)
    return tensor


def stored_form(tensor: torch.Tensor) -> Stored | None:
    """The form in which a file stores these values; None where that is not known."""
    return getattr(tensor, _ATTRIBUTE, None)


def describe_stored(model: nn.Module) -> tuple[str, ...]:
    """A sentence on the weights that remember how they are stored; none where no weight does."""
    forms = [stored for weight in model.parameters() if (stored := stored_form(weight)) is not None]
    if not forms:
        return ()
    kinds = Counter(stored.name for stored in forms)
    counts = ", ".join(f"{count} in {name}" for name, count in kinds.most_common())
    where = "in blocks" if isinstance(forms[0], StoredWeight) else "quantized"
    return (f"the file stores {len(forms)} weights {where} ({counts}); use-stored-weights reads them as they are",)
