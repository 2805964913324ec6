"""What the readers of quantized checkpoints share: a layer as they return it, and the fields of a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from lissom.errors import UnsupportedError
from lissom.frontends.checkpoints.stored_weights import PackedWeight
from lissom.io.fields import shown

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
