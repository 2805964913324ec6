"""The lines of a program's text, split into names and the text between them, which equal layers share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

# The path of a module may hold any characters, and ends the line; so may the name of a weight.
_NAME = re.compile(r"(%[\w.]+|@[^\s:,()\[\]'\"]+|(?<=  # ).+$)")
_INPUT = re.compile(r"(\w+): (\w+\[[^\]]*\])")
"""An input of the program, in its first line."""


@dataclass(frozen=True)
class Line:
    """A line of a program's text.

    Attributes:
        pieces: the text around the names, one more than there are names.
        names: `%node`, `@weight`, and last the module path, if there is one.
    """

    pieces: tuple[str, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Line:
        parts = _NAME.split(text)
        return cls(tuple(parts[0::2]), tuple(parts[1::2]))

    @cached_property
    def defines(self) -> str:
        """The name of the node or weight that the line defines; empty for the other lines."""
        is_definition = len(self.pieces) > 1 and self.pieces[1].startswith(": ") and self.pieces[0] in ("  ", "  weight ")
        return self.names[0] if is_definition else ""

    @cached_property
    def path(self) -> str:
        """The module path of a node; empty when it has none."""
        return self.names[-1] if self.is_node and self.pieces[-2].endswith("  # ") else ""

    @property
    def is_node(self) -> bool:
        """True for the line of an operator call."""
        return self.defines.startswith("%")

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """The names of the nodes and weights that a node reads, in the order of its arguments."""
        if not self.is_node:
            return ()
        return self.names[1:-1] if self.path else self.names[1:]

    @cached_property
    def pattern(self) -> str:
        """The line of a node with its names left out: `f32[batch, 384] = aten.linear(…, …, …)`."""
        last = len(self.pieces) - 1 if self.path else len(self.pieces)
        return "…".join(self.pieces[1:last]).removeprefix(": ").removesuffix("  # ")

    @cached_property
    def type(self) -> str:
        """The type of the node or weight that the line defines."""
        return self.pieces[1].removeprefix(": ").partition(" = ")[0] if self.defines else ""


def input_types(lines: Sequence[Line]) -> dict[str, str]:
    """The types of a program's inputs, by the names of their nodes without `%`."""
    inputs = _INPUT.findall(lines[0].pieces[0])
    # fx adds `_1` to the name of a builtin, such as `input`.
    return {f"{name}{end}": kind for end in ("_1", "") for name, kind in inputs}
