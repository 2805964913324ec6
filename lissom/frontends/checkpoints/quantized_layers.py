"""What the readers of quantized checkpoints share: a layer as they return it, and the fields of a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from lissom.errors import ArtifactError, UnsupportedError
from lissom.frontends.checkpoints.stored_tensors import StoredTensors
from lissom.frontends.checkpoints.stored_weights import PackedWeight
from lissom.io.fields import shown
from lissom.ops.formats import dequantize
from lissom.ops.gguf_blocks import StoredBlocks

Value = TypeVar("Value")


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer of a checkpoint whose weight is stored in integers or fp8.

    Attributes:
        names: the tensors of the file that make up the weight.
        weight: as stored; None where no operator holds it.
        values: the weight in float32, if it is not held as stored.
    """

    names: frozenset[str]
    weight: PackedWeight | None
    values: torch.Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """The fields of a quantization configuration, with errors that name the file."""

    file: Path
    fields: Mapping[str, object]

    def refuse(
        self, what: str, found: object, allowed: str, advice: str = "quantize the model again to one of these"
    ) -> NoReturn:
        """Raise UnsupportedError: the file asks for what is not read."""
        raise UnsupportedError(f"{self.file}: {what} is {shown(found)}, and Lissom reads {allowed}; {advice}")

    def one_of(self, name: str, allowed: Sequence[Value], what: str, default: object = None) -> Value:
        """A field that is one of the allowed values. Raises UnsupportedError for another."""
        value = self.fields.get(name, default)
        if isinstance(value, bool) or value not in allowed:
            self.refuse(f"{what} ({name})", value, " or ".join(map(str, allowed)))
        return allowed[allowed.index(value)]

    def group_size(self, name: str = "group_size", default: int = 128) -> int:
        """The number of inputs that share a scale; -1 for all. Raises UnsupportedError for another value."""
        value = self.fields.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not (value == -1 or 0 < value < 1 << 31):
            self.refuse(f"the group size ({name})", value, "a number of inputs, or -1 for all of a layer")
        return value


def partial_group(directory: Path, layer: str, inputs: int, group: int) -> UnsupportedError:
    """The error of a layer whose last group is not whole."""
    return UnsupportedError(
        f"{directory}: '{layer}' has {inputs} inputs in groups of {group}, so its last group is partial, and Lissom reads "
        f"whole groups; quantize the model again with a group size that divides {inputs}"
    )


def describe(format: str, groups: int, group: int) -> str:
    """How a weight is stored: `int4 in groups of 128`, `int8 per channel`."""
    return f"{format} per channel" if groups == 1 else f"{format} in groups of {group}"


def group_of_inputs(tensors: StoredTensors, name: str, columns: int, groups: int, group: int) -> torch.Tensor | None:
    """The group of each input, [columns]; None where groups are of neighbours.

    Args:
        name: of a tensor with these groups, which may be missing, empty, or -1 everywhere where it is not used.
        group: the inputs of a scale.

    Raises:
        ArtifactError: for groups that do not exist.
    """
    if name not in tensors or tensors.shape(name) == (0,):
        return None
    tensors.check(name, ("I32", "I64"), [(columns,)], f"the order of {columns} inputs")
    group_of = tensors.tensor(name).long()
    if bool((group_of == -1).all()) or bool((group_of == torch.arange(columns) // group).all()):
        return None
    low, high = (int(end) for end in group_of.aminmax())
    if low < 0 or high >= groups:
        raise ArtifactError(
            f"{tensors.directory} names the groups {low} to {high} in '{name}', and there are {groups}, from 0; "
            f"copy the checkpoint again"
        )
    return group_of


def scattered_values(stored: StoredBlocks, group_of: torch.Tensor) -> torch.Tensor:
    """A weight in float32, whose groups are of different sizes.

    Args:
        group_of: the group of each input, [columns].
    """
    zero_point = None if stored.zero_point is None else stored.zero_point[:, group_of]
    return dequantize(stored.q, stored.scale[:, group_of], zero_point, torch.float32)
