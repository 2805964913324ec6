"""Identical layers: numbered modules whose nodes are the same but for their names.

Two layers are identical when their nodes, in order, have the same operators, types, constants and module paths below the
layer, and read each other in the same way. What a layer reads from outside has the same type; if several layers read it, such
as a mask or a shared weight, it is the same value. Values of weights are not compared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from lissom.inspect.html.lines import Line

_MOST_DIFFERENCES = 4
_INPUT = re.compile(r"(\w+): (\w+\[[^\]]*\])")
"""An input of the program, in its first line."""


@dataclass(frozen=True)
class Group:
    """Identical layers.

    members: their numbers, in order. differences: what the largest group has (`- …`) and this one has (`+ …`), by patterns of
    nodes; empty for the largest group.
    """

    members: tuple[str, ...]
    differences: tuple[str, ...] = ()


def identical_layers(lines: Sequence[Line]) -> dict[str, tuple[Group, ...]]:
    """The groups of identical layers below each module that has numbered ones, by its path; none where no two are identical."""
    types = {f"%{name}": type_ for name, type_ in _INPUT.findall(lines[0].pieces[0])}
    types |= {line.defines: line.type for line in lines if line.defines}
    found: dict[str, tuple[Group, ...]] = {}
    for container, layers in _numbered(lines).items():
        forms = _forms(container, layers, types) if len(layers) > 1 else {}
        groups: dict[Form, list[str]] = {}
        for number, form in forms.items():
            groups.setdefault(form, []).append(number)
        if len(groups) < len(forms):
            largest = max(groups, key=lambda form: len(groups[form]))
            differences = {form: () if form == largest else _differences(forms[groups[largest][0]], form) for form in groups}
            found[container] = tuple(Group(tuple(members), differences[form]) for form, members in groups.items())
    return found


def _numbered(lines: Sequence[Line]) -> dict[str, dict[str, list[Line]]]:
    """The nodes of every numbered module, by the path of its parent and by its number."""
    found: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        parts = line.path.split(".")
        for index, part in enumerate(parts):
            if part.isdecimal():
                found.setdefault(".".join(parts[:index]), {}).setdefault(part, []).append(line)
    return found


Form = tuple[tuple[str, str, tuple[object, ...]], ...]
"""For each node of a layer its pattern, its path below the layer, and what it reads."""


def _forms(container: str, layers: Mapping[str, Sequence[Line]], types: Mapping[str, str]) -> dict[str, Form]:
    """The form of every layer; layers with equal forms are identical."""
    readers: dict[str, set[str]] = {}
    owners: dict[str, int] = {}
    for index, (number, lines) in enumerate(layers.items()):
        owners |= {line.defines: index for line in lines}
        for name in {name for line in lines for name in line.reads}:
            readers.setdefault(name, set()).add(number)
    found: dict[str, Form] = {}
    for index, (number, lines) in enumerate(layers.items()):
        start = len(f"{container}.{number}" if container else number)
        own = {line.defines: place for place, line in enumerate(lines)}
        outside: dict[str, object] = {}
        for name in (name for line in lines for name in line.reads if name not in own):
            alone = name in types and len(readers[name]) == 1
            # The layer before is where a layer's input usually comes from; the first layer's comes from outside.
            distance = max(index - owners.get(name, index - 1), 1)
            outside.setdefault(name, (len(outside), types[name], distance) if alone else (name, types.get(name, "")))
        found[number] = tuple(
            (line.pattern, line.path[start:], tuple(own.get(name, outside.get(name)) for name in line.reads)) for line in lines
        )
    return found


def _differences(usual: Form, form: Form) -> tuple[str, ...]:
    """The patterns that one form has more often than the other, else what they read; the first few."""
    views: tuple[Callable[[tuple[str, str, tuple[object, ...]]], str], ...] = (
        lambda item: item[0],
        lambda item: f"{item[0]} in {item[1].lstrip('.')}",
        lambda item: f"{item[0]}: {item[2]}",
    )
    for part in views:
        before, after = Counter(map(part, usual)), Counter(map(part, form))
        pairs = zip_longest((f"- {item}" for item in before - after), (f"+ {item}" for item in after - before))
        lines = [line for pair in pairs for line in pair if line is not None]
        if lines:
            more = len(lines) - _MOST_DIFFERENCES
            return (*lines[:_MOST_DIFFERENCES], *([f"and {more} more"] if more > 0 else []))
    return ("the same nodes in another order",)
