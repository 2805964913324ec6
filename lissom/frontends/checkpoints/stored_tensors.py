"""The tensors of a checkpoint in safetensors, by name: their shapes and dtypes from the headers, their values mapped."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lissom.errors import ArtifactError
from lissom.frontends.checkpoints.shards import INDEX

_WHOLE = "model.safetensors"
FLOATS = ("F16", "BF16", "F32")
"""The dtypes of scales."""


class StoredTensors:
    """The tensors of a directory that `check_shards` accepted. Values are mapped from the files, and read on use."""

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        self.directory = directory
        opener: Any = safe_open
        files: list[Any] = [opener(str(path), framework="pt") for path in _files(directory)]
        self._files: Mapping[str, Any] = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the header gives. Raises ArtifactError if there is no such tensor."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype by its name in the format, such as `I32`. Raises ArtifactError if there is no such tensor."""
        return str(self._file(name).get_slice(name).get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        """The values, mapped from the file."""
        return self._file(name).get_tensor(name)

    def check(self, name: str, dtypes: Collection[str], shapes: Collection[Sequence[int]], reason: str) -> None:
        """Check a tensor by its header.

        Args:
            shapes: those that are allowed.
            reason: what the shapes follow from.

        Raises:
            ArtifactError: if it is missing, or has another dtype or shape.
        """
        if (dtype := self.dtype(name)) not in dtypes:
            raise ArtifactError(
                f"{self.directory} stores '{name}' as {dtype}, and {reason} is read from {', '.join(dtypes)}; "
                f"copy the checkpoint again"
            )
        if (shape := self.shape(name)) not in [tuple(allowed) for allowed in shapes]:
            allowed = " or ".join(str([*allowed]) for allowed in dict.fromkeys(map(tuple, shapes)))
            raise ArtifactError(
                f"{self.directory} has '{name}' in the shape {[*shape]}, and {reason} needs {allowed}; "
                f"copy the checkpoint again"
            )

    def finite(self, name: str) -> torch.Tensor:
        """The values of scales. Raises ArtifactError if one is infinite or NaN."""
        scale = self.tensor(name)
        if not bool(scale.isfinite().all()):
            raise ArtifactError(
                f"{self.directory} has scales in '{name}' that are not finite; copy or quantize the model again"
            )
        return scale

    def _file(self, name: str) -> Any:
        if name not in self._files:
            raise ArtifactError(f"{self.directory} lacks '{name}', which its quantized weight needs; copy the checkpoint again")
        return self._files[name]


def _files(directory: Path) -> list[Path]:
    """The files of the weights. Raises ArtifactError if it is not clear which they are."""
    if (directory / INDEX).is_file():
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        return [directory / shard for shard in dict.fromkeys(index["weight_map"].values())]
    if (directory / _WHOLE).is_file():
        return [directory / _WHOLE]
    found = sorted(directory.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ArtifactError(
            f"{directory} has quantized weights in one {_WHOLE}, or in shards with {INDEX}, and neither is there (files: "
            f"{names}); convert the weights to safetensors"
        )
    return found
