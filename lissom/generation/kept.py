"""Decoders kept in the user's cache, so that `lissom generate` compiles a model once.

A decoder is kept under a hash of what it depends on: the checkpoint's files (by size and time of change), passes, options,
calibration data, Lissom's own files, the versions of packages, the kind of processor, the kernels, and the number of threads.
The last few are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lissom.errors import InputError
from lissom.generation.directory import is_saved
from lissom.measure.choice import SWITCH as KERNELS
from lissom.ops.native import describe_kernels
from lissom.ops.native.build import cache_folder, locked
from lissom.ops.native.instruction_sets import processor_features

SWITCH = "LISSOM_KEPT_DECODERS"
"""The environment variable with the number of decoders that are kept; 0 keeps none."""
_KEPT = 3
_PACKAGES = ("torch", "transformers", "tokenizers", "onnxruntime", "onnxscript", "onnx-ir")
_OF_CHECKPOINTS = (".json", ".safetensors", ".bin", ".gguf", ".model", ".txt", ".jinja")
"""The kinds of files that a checkpoint is read from."""
_LEFT_SECONDS = 24 * 3600
"""Folders under a temporary name are removed when nothing was written to them for so long."""
_LEAVING = "-removed"
"""A part of the temporary names of decoders that are being removed."""
STEP = 256
"""A kept decoder's capacity is rounded up to a multiple of this number of tokens, so that it serves other prompts too."""


def count() -> int:
    """The number of decoders to keep. Raises InputError if the environment variable is not a number."""
    given = os.environ.get(SWITCH, str(_KEPT))
    if not given.isdecimal():
        raise InputError(f"{SWITCH} is {given!r:.80}; give the number of decoders to keep, 0 for none")
    return int(given)


def place_of(checkpoint: Path, data: Path | None, options: Mapping[str, object]) -> Path:
    """The folder of the decoder of a checkpoint's directory with these options; it may not exist yet.

    Raises:
        OSError: if the user's cache cannot be used.
    """
    package = Path(__file__).parents[1]
    parts = {
        "files": _stamps(path for path in checkpoint.iterdir() if path.suffix in _OF_CHECKPOINTS),
        "data": _stamps([] if data is None else data.iterdir() if data.is_dir() else [data]),
        "lissom": _stamps(path for path in package.rglob("*") if path.suffix in (".py", ".h", ".cpp")),
        "versions": {name: _version(name) for name in _PACKAGES},
        "processor": sorted(processor_features()),
        "kernels": [describe_kernels(), os.environ.get(KERNELS, "")],
        "threads": torch.get_num_threads(),
        "options": {name: str(value) for name, value in options.items()},
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]
    folder = cache_folder() / "decoders"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / key


def _stamps(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    statuses = ((path.resolve(), path.stat()) for path in sorted(paths) if path.is_file())
    return [(str(path), status.st_size, status.st_mtime_ns) for path, status in statuses]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def use(place: Path) -> bool:
    """True if a decoder is cached there; marks it as most recently used."""
    if not is_saved(place):
        return False
    with suppress(OSError), locked(_lock(place.parent)):  # a cache that can only be read
        os.utime(place)
    return is_saved(place)  # another process may have removed it meanwhile


def forget_oldest(folder: Path) -> None:
    """Remove all kept decoders but the last ones used. Processes that do so at once take turns.

    Raises:
        OSError: if the cache cannot be written.
    """
    with locked(_lock(folder)):
        saved = sorted((path for path in folder.iterdir() if path.name[0] != "." and is_saved(path)), key=_last_use)
        for path in saved[: max(0, len(saved) - count())]:
            # Renamed first, so that no process loads a part of it.
            path.rename(path.with_name(f".{path.name}{_LEAVING}-{secrets.token_hex(8)}"))
        # Also what a process left that was ended meanwhile.
        for path in folder.glob(".*"):
            if _LEAVING in path.name or time.time() - _last_use(path) > _LEFT_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _lock(folder: Path) -> Path:
    """The lock of the folder of kept decoders, next to it."""
    return folder.with_suffix(".lock")


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def rounded(tokens: int) -> int:
    """The capacity of a kept decoder for so many tokens."""
    return -(-tokens // STEP) * STEP
