"""Tables of one rule for each operator, by its name."""

from __future__ import annotations

from typing import TypeVar

Rule = TypeVar("Rule")


def register(rules: dict[str, Rule], rule: Rule, *names: str) -> None:
    """Enter a rule for ATen operators by name: `softmax.int`, or `linear` for `linear.default`."""
    for name in names:
        rules[f"aten.{name}" if "." in name else f"aten.{name}.default"] = rule
