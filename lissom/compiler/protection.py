"""Which parts of a program the user keeps passes away from, by patterns of module paths."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import fx

from lissom.compiler import node as nodes


def is_protected(node: fx.Node, patterns: Iterable[str]) -> bool:
    """True when the module that made the node, or one around it, has a path that fits one of the patterns.

    So `encoder.layer.0` protects all of that layer, and `*.output.dense` all layers of that name.
    """
    return any_protected(nodes.origin(node).module_path, patterns)


def any_protected(path: str, patterns: Iterable[str]) -> bool:
    """True when the module path, or one it lies in, fits one of the patterns."""
    parts = path.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(item, pattern) for pattern in patterns for item in around)
