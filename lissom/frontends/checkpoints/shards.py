"""The files of a checkpoint in safetensors, checked by their headers before anything is read from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lissom.errors import ArtifactError

INDEX = "model.safetensors.index.json"
"""The file that names the shard of each weight."""
_LONGEST_HEADER = 100_000_000
"""Bytes; that of the format's own readers."""


def check_shards(directory: Path) -> None:
    """Check that the files hold what the index names, and as many bytes as their headers say.

    Raises:
        ArtifactError: naming the file that is missing, cut short, or differs from the index.
    """
    if not (directory / INDEX).is_file():
        for path in directory.glob("*.safetensors"):
            _sizes(path)
        return
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        shards = {str(name): str(shard) for name, shard in index["weight_map"].items()}
        total = index.get("metadata", {}).get("total_size")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{directory / INDEX} is no index of weights; copy the checkpoint again") from error
    found: dict[str, Mapping[str, int]] = {}
    for shard in dict.fromkeys(shards.values()):
        path = directory / shard
        first = next(name for name, other in shards.items() if other == shard)
        if Path(shard).name != shard or not path.is_file():
            raise ArtifactError(f"{directory} lacks {shard}, which the index names for '{first}'; copy the checkpoint again")
        found[shard] = _sizes(path)
    lost = next((name for name, shard in shards.items() if name not in found[shard]), None)
    if lost is not None:
        raise ArtifactError(
            f"{directory / shards[lost]} has no '{lost}', which the index places there; copy the checkpoint again"
        )
    size = sum(found[shard][name] for name, shard in shards.items())
    if isinstance(total, int) and total != size:
        raise ArtifactError(
            f"the weights in {directory} have {size} bytes, and the index says {total}: a shard has other shapes or dtypes; "
            f"copy the checkpoint again"
        )


def _sizes(path: Path) -> dict[str, int]:
    """The bytes of each weight in a file. Raises ArtifactError if the file is cut short, or has no header."""
    length = path.stat().st_size
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(_LONGEST_HEADER, length - 8):
            raise ArtifactError(f"{path} has no header of safetensors; copy the file again")
        try:
            header: dict[str, Any] = json.loads(file.read(size))
            spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
            sizes = {name: int(end) - int(start) for name, (start, end) in spans.items()}
            last = max((int(end) for _, end in spans.values()), default=0)
            odd = next((name for name in spans if not _is_whole(header[name], sizes[name])), None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} has no header of safetensors; copy the file again") from error
    if odd is not None:
        raise ArtifactError(f"{path} has {sizes[odd]} bytes for '{odd}', which is not its shape's; copy the file again")
    if 8 + size + last != length:
        raise ArtifactError(f"{path} has {length} bytes, and its header says {8 + size + last}; copy the file again")
    return sizes


def _is_whole(entry: Mapping[str, Any], size: int) -> bool:
    """True if so many bytes hold a whole number of elements of the entry's shape."""
    count = math.prod(int(length) for length in entry["shape"])
    return size >= 0 and (size == 0 if count == 0 else size % count == 0 or size * 8 % count == 0)
