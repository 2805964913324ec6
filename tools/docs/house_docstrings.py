"""Turns the docstrings of the package into Markdown for the reference: arguments as a list, examples as code blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe

_NAMED = re.compile(r"^([a-z_*]\w*(?:, [a-z_*]\w*)*): ")
_LATER = re.compile(r"(?<=[.;]) ([a-z_]\w*(?:, [a-z_]\w*)*): ")


class HouseDocstrings(griffe.Extension):
    """A griffe extension that rewrites every docstring when its object is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            known = {item.name for item in obj.parameters} if isinstance(obj, griffe.Function) else set(obj.members)
            obj.docstring.value = markdown(obj.docstring.value, known)


def markdown(text: str, known: set[str]) -> str:
    """The docstring as Markdown. known: names of arguments or fields, which begin an item of a list."""
    lines: list[str] = []
    example: list[str] = []
    for block in re.split(r"\n\s*\n", text.strip()):
        if block.startswith(">>> "):
            example += [*([""] if example else []), *block.split("\n")]
        else:
            lines += ["", *_paragraph(block, known)]
    if example:
        lines += ["", "```pycon", *(line if line != "<BLANKLINE>" else "" for line in example), "```"]
    return "\n".join(lines).strip()


def _paragraph(block: str, known: set[str]) -> list[str]:
    """A paragraph; lines `name: meaning` become items of a list, `Raises:` is bold."""
    joined: list[str] = []
    for line in block.split("\n"):
        if _is_item(line, known) or line.startswith(("- ", "Raises:", "Returns:")) or not joined:
            joined.append(line.strip())
        else:
            joined[-1] += f" {line.strip()}"
    lines: list[str] = []
    for line in joined:
        if line.startswith(("Raises:", "Returns:")):
            head, _, rest = line.partition(":")
            lines += ["", f"**{head}:**{rest}"]
        elif _is_item(line, known):
            items = _LATER.sub(lambda found: f"\n{found[1]}: " if _known(found[1], known) else found.group(), line).split("\n")
            lines += [*([""] if not lines or not lines[-1].startswith("- ") else []), *map(_item, items)]
        else:
            lines += ["", line] if lines and lines[-1].startswith("- ") and not line.startswith("- ") else [line]
    return lines


def _is_item(line: str, known: set[str]) -> bool:
    found = _NAMED.match(line)
    return found is not None and _known(found[1], known)


def _known(names: str, known: set[str]) -> bool:
    return set(names.replace("*", "").split(", ")) <= known


def _item(line: str) -> str:
    names, _, meaning = line.partition(": ")
    return f"- {', '.join(f'`{name}`' for name in names.split(', '))}: {meaning}"
