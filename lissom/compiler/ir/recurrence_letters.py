"""The names of the dimensions of recurrences' operands and results: dimensions of one name are one dimension."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from lissom.ops import gated_delta_rule, selective_scan

HEADS, SHARED = "heads", "shared"
"""Heads, and those that several heads share: as many, or a divisor of their number."""

_VALUES = ("batch", "tokens", HEADS, "channels")
_KEYS = ("batch", "tokens", SHARED, "states")
_RATES = ("batch", "tokens", HEADS, "states")
LETTERS: Mapping[object, tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]] = {
    gated_delta_rule: (
        (_KEYS, _KEYS, _VALUES, _RATES, _RATES, ("batch", HEADS, "states", "channels")),
        (_VALUES, ("batch", HEADS, "states", "channels")),
    ),
    selective_scan: (
        (_VALUES, _RATES, (HEADS, "states"), _KEYS, _KEYS, (HEADS,), ("batch", HEADS, "channels", "states")),
        (_VALUES, ("batch", HEADS, "channels", "states")),
    ),
}
"""By operator the names of each operand's dimensions, of which the last may be missing, and of each result's."""


def operands_of(node: fx.Node) -> list[tuple[fx.Node, tuple[str, ...]]]:
    """The tensors that a recurrence is called with, and the names of their dimensions."""
    given = [*node.args, *node.kwargs.values()]
    return [(item, names) for item, names in zip(given, LETTERS[node.target][0], strict=False) if isinstance(item, fx.Node)]
