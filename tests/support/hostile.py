"""Artifacts changed by someone who can write hashes: their files are rewritten, and the manifest is sealed anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lissom.artifacts.manifest import NAME, Content, Manifest, read_manifest, write_manifest


def seal(folder: Path, **changes: object) -> None:
    """Write the manifest with the files' present hashes, and other fields."""
    found = read_manifest(folder / NAME)
    files = {name: Content.of(folder / name) for name in found.files}
    write_manifest(Manifest(**(vars(found) | {"files": files} | changes)), folder / NAME)


def change(folder: Path, edit: Callable[[Any], object]) -> None:
    """Change the program of an artifact."""
    path = folder / "program.json"
    program = json.loads(path.read_text())
    edit(program)
    path.write_text(json.dumps(program))
    seal(folder)


def node(program: Any, target: str) -> Any:
    """The first node that calls an operator, or reads a weight of that name."""
    return next(item for item in program["nodes"] if item.get("target") == target)
