"""Which parts of a program the user keeps passes away from, by patterns of module paths."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import fx

from lissom.compiler.ir import node as nodes


def obstacle_by_name(*chosen: fx.Node, skip: str, only: str) -> str | None:
    """Why what these nodes stand for is left alone, by patterns as of `is_protected`; None when it is treated.

    skip: what is left alone. only: what alone is treated; where it is empty, all of it.
    """
    if any(is_protected(node, skip) for node in chosen):
        return "skip= names it"
    if only and not all(is_protected(node, only) for node in chosen):
        return "only= does not name it"
    return None


def is_protected(node: fx.Node, patterns: str) -> bool:
    """True when the module that made the node, or one around it, has a path that fits one of the patterns.

    patterns: divided by blanks or commas. `encoder.layer.0` protects all of that layer, `*.dense` all modules of that name.
    """
    return is_path_protected(nodes.origin(node).module_path, patterns)


def is_path_protected(path: str, patterns: str) -> bool:
    """True when the module path, or one it lies in, fits one of the patterns."""
    parts = path.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(item, pattern) for pattern in patterns.replace(",", " ").split() for item in around)
