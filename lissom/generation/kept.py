"""Decoders kept in the user's cache, so that `lissom generate` compiles a model once.

A decoder is kept under a hash of what it depends on: the checkpoint's files (by size and time of change), passes, options,
calibration data, Lissom's own files, the versions of packages, and the kind of processor. The last few are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from lissom.errors import InputError
from lissom.generation.directory import is_saved
from lissom.ops.native.build import cache_folder
from lissom.ops.native.instruction_sets import processor_features

SWITCH = "LISSOM_KEPT_DECODERS"
"""The environment variable with the number of decoders that are kept; 0 keeps none."""
_KEPT = 3
STEP = 256
"""A kept decoder's capacity is a multiple of this number of tokens, so that it serves other prompts too."""


def count() -> int:
    """How many decoders are kept. Raises: InputError if the environment variable is not a number."""
    given = os.environ.get(SWITCH, str(_KEPT))
    if not given.isdecimal():
        raise InputError(f"{SWITCH} is {given!r:.80}; give the number of decoders to keep, 0 for none")
    return int(given)


def place_of(checkpoint: Path, data: Path | None, options: Mapping[str, object]) -> Path:
    """The folder of the decoder of a checkpoint's directory with these options; it may not exist yet.

    Raises: OSError if the user's cache cannot be used.
    """
    package = Path(__file__).parents[1]
    parts = {
        "files": [*_stamps(checkpoint.rglob("*")), *_stamps([data] if data else [])],
        "lissom": _stamps(package.rglob("*.py")),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "processor": sorted(processor_features()),
        "threads": torch.get_num_threads(),
        "options": {name: str(value) for name, value in options.items()},
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache_folder() / "decoders"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / key


def _stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    found = ((path, path.stat()) for path in sorted(paths) if path.is_file())
    return [(str(path), status.st_size, status.st_mtime_ns) for path, status in found]


def use(place: Path) -> bool:
    """Whether a decoder is kept there; it is then the one that was used last."""
    if not is_saved(place):
        return False
    os.utime(place)
    return True


def forget_oldest(folder: Path) -> None:
    """Remove all kept decoders but the last ones used."""
    found = sorted((path for path in folder.iterdir() if is_saved(path)), key=lambda path: path.stat().st_mtime)
    for path in found[: max(0, len(found) - count())]:
        shutil.rmtree(path, ignore_errors=True)


def rounded(tokens: int) -> int:
    """The capacity of a kept decoder for so many tokens."""
    return -(-tokens // STEP) * STEP
