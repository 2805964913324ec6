"""Files that are read only when they are what they were found to be: the same file, unchanged since its hash was taken."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from lissom.compiler.errors import ArtifactError

_HANDLES = Path("/proc/self/fd")
Identity = tuple[int, ...]


@dataclass(frozen=True)
class Content:
    """One file's size in bytes and SHA-256.

    seen: which file had them, and when it was last changed; None where that is not known, as in a manifest.
    """

    size: int
    sha256: str
    seen: Identity | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, path: Path) -> Content:
        with path.open("rb") as file:
            seen = _identity(file)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(file.tell(), digest, seen)


@contextmanager
def open_same(path: Path, content: Content | None) -> Generator[BinaryIO]:
    """The file, open to be read. content: what it was found to hold; None asks for nothing.

    Raises: ArtifactError when it is another file by now, or was changed; OSError.
    """
    with path.open("rb") as file:
        if content is not None and content.seen is not None and content.seen != _identity(file):
            raise ArtifactError(f"'{path}' was changed while it was loaded; load it again when no one writes to it")
        yield file


def handle_path(file: BinaryIO) -> Path | None:
    """A path that opens the file a handle is of, whatever its name stands for by now; None where the system has none."""
    path = _HANDLES / str(file.fileno())
    return path if path.exists() else None


def _identity(file: BinaryIO) -> Identity:
    """Which file it is, its size, and when it was last written to; the last number also changes when the others are set."""
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
