"""Notices a file of the current directory that Python imports in place of an installed package."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.metadata import distributions
from pathlib import Path

_NEEDED = ("torch", "numpy", "rich", "safetensors", "sympy", "transformers", "typer")


def shadowed_package(folder: Path) -> str | None:
    """A sentence on the first package Lissom needs that a file in `folder` hides, or None."""
    if not _searched_first(folder):
        return None
    for name in _NEEDED:
        spec = importlib.util.find_spec(name)
        place = None if spec is None or spec.origin is None else Path(spec.origin)
        if place is not None and folder in (place.parent, place.parent.parent) and not _is_installed(name, place):
            shown = place if place.parent == folder else place.parent
            return f"'{shown.name}' in this directory hides the package {name}; rename it, or run from another directory"
    return None


def shadowed_install(folder: Path, package: Path) -> str | None:
    """A sentence when Lissom runs from `folder` while another copy is installed, or None.

    Args:
        package: the one that runs.
    """
    if package.parent != folder or not _searched_first(folder) or str(folder) in os.environ.get("PYTHONPATH", "").split(":"):
        return None
    for distribution in distributions(name="lissom"):
        installed = Path(str(distribution.locate_file("lissom")))
        if installed.is_dir() and installed != package:
            return f"lissom/ of this directory runs, not the installed {installed}; run from another directory for that one"
    return None


def _searched_first(folder: Path) -> bool:
    """True where `python -m` or a script of the folder put it in front of all others."""
    return bool(sys.path) and Path(sys.path[0] or ".").resolve() == folder


def _is_installed(name: str, place: Path) -> bool:
    """True where a package of that name is installed at that place: the folder is one of site-packages."""
    return any(Path(str(distribution.locate_file(name))) in (place.parent, place) for distribution in distributions(name=name))


def refuse_shadows() -> None:
    """Stop before an import of such a file fails somewhere else: `python -m lissom` with a sentence, else with an error.

    Raises:
        ImportError: if there is such a file.
        SystemExit: likewise, under `python -m lissom`.
    """
    sentence = shadowed_package(Path.cwd())
    if sentence is None:
        return
    # Python calls the command so while it looks for its module.
    if sys.argv[:1] == ["-m"]:
        sys.stderr.write(f"error: {sentence}\n")
        raise SystemExit(1)
    raise ImportError(sentence)
