"""Single files: refused before work is done, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from lissom.compiler.errors import ArtifactError


def check_writable(path: Path) -> None:
    """Refuse a path that could not be written, before the work is done.

    Raises: ArtifactError.
    """
    if not path.parent.is_dir():
        raise ArtifactError(f"'{path}' cannot be written: there is no directory '{path.parent}'; make it first")
    if path.is_dir():
        raise ArtifactError(f"'{path}' cannot be written: it is a directory; name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise ArtifactError(f"'{path}' cannot be written: '{path.parent}' takes no new files; choose another directory")


def write_whole(path: Path, content: str) -> None:
    """Write a file completely or not at all: to a temporary name beside it, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
