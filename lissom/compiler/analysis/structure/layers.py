"""The layer of each site, derived from the module paths of all sites."""

from __future__ import annotations

from collections.abc import Sequence


def layer_paths(attention: Sequence[str], feed_forward: Sequence[str]) -> tuple[list[str], list[str]]:
    """For the path of each attention and of each feed-forward, the path of its layer.

    A layer is the deepest module path ending in a number that holds an attention and a feed-forward: `encoder.block.0` of
    `encoder.block.0.layer.1.DenseReluDense`. A site without such a path has its own deepest numbered one, or its whole path.
    """
    both = {prefix for path in attention for prefix in _numbered(path)} & {
        prefix for path in feed_forward for prefix in _numbered(path)
    }
    return [_layer(path, both) for path in attention], [_layer(path, both) for path in feed_forward]


def in_order(path: str) -> list[tuple[int, str]]:
    """A key that sorts module paths with numbers as numbers: `layer.2` before `layer.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _numbered(path: str) -> list[str]:
    """The prefixes of a path that end in a number, deepest first."""
    parts = path.split(".")
    return [".".join(parts[: index + 1]) for index in range(len(parts) - 1, -1, -1) if parts[index].isdigit()]


def _layer(path: str, both: set[str]) -> str:
    numbered = _numbered(path)
    return next((prefix for prefix in numbered if prefix in both), numbered[0] if numbered else path)
