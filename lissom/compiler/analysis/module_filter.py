"""Selects the parts of a program that passes may change, by patterns of module paths."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import fx

from lissom.compiler.ir import node as nodes


def obstacle_by_name(*chosen: fx.Node, skip: str, only: str) -> str | None:
    """The reason a pass must not change these nodes, by the patterns of `is_protected`; None if it may change them.

    Args:
        skip: modules to leave alone.
        only: the only modules to change; all when it is empty.
    """
    if any(is_protected(node, skip) for node in chosen):
        return "skip= names it"
    if only and not all(is_protected(node, only) for node in chosen):
        return "only= does not name it"
    return None


def is_protected(node: fx.Node, patterns: str) -> bool:
    """True when the path of the node's module, or of a module that contains it, matches one of the patterns.

    Args:
        patterns: separated by spaces or commas. `encoder.layer.0` matches all of that layer, `*.dense` all modules of that
            name.
    """
    return is_path_protected(nodes.origin(node).module_path, patterns)


def is_path_protected(path: str, patterns: str) -> bool:
    """True when the module path, or that of a containing module, matches one of the patterns."""
    parts = path.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(prefix, pattern) for pattern in patterns.replace(",", " ").split() for prefix in around)
