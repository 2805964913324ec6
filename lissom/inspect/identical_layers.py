"""Identical layers: numbered modules whose nodes are the same but for their names.

Two layers are identical when their nodes, in order, have the same operators, types, constants and module paths below the
layer, and read each other in the same way. What a layer reads from outside has the same type; if several layers read it, such
as a mask or a shared weight, it is the same value. Values of weights are not compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from lissom.inspect.lines import Line, input_types

_MOST_DIFFERENCES = 4


@dataclass(frozen=True)
class Group:
    """Identical layers.

    Attributes:
        members: their numbers, in order.
        differences: what the largest group has (`- …`) and this one has (`+ …`), by patterns of nodes; empty for the largest
            group.
    """

    members: tuple[str, ...]
    differences: tuple[str, ...] = ()


def identical_layers(lines: Sequence[Line]) -> dict[str, tuple[Group, ...]]:
    """The groups of identical layers below each module that has numbered ones, by its path; none where no two are identical."""
    types = {f"%{name}": type_ for name, type_ in input_types(lines).items()}
    types |= {line.defines: line.type for line in lines if line.defines}
    by_container: dict[str, tuple[Group, ...]] = {}
    for container, layers in _numbered(lines).items():
        forms = _forms(container, layers, types) if len(layers) > 1 else {}
        groups: dict[Form, list[str]] = {}
        for number, form in forms.items():
            groups.setdefault(form, []).append(number)
        if len(groups) < len(forms):
            largest = max(groups, key=lambda form: len(groups[form]))
            differences = {form: () if form == largest else _differences(forms[groups[largest][0]], form) for form in groups}
            by_container[container] = tuple(Group(tuple(members), differences[form]) for form, members in groups.items())
    return by_container


def _numbered(lines: Sequence[Line]) -> dict[str, dict[str, list[Line]]]:
    """The nodes of every numbered module, by the path of its parent and by its number."""
    numbered: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        parts = line.path.split(".")
        for index, part in enumerate(parts):
            if part.isdecimal():
                numbered.setdefault(".".join(parts[:index]), {}).setdefault(part, []).append(line)
    return numbered


class Outside(NamedTuple):
    """A value or weight from outside a layer that no other layer reads.

    Attributes:
        order: among the layer's own such inputs.
        layers_back: how many layers before this one the layer is that has it; 1 for one outside all layers.
        place: the place of the node there; None for one outside all layers.
    """

    order: int
    is_weight: bool
    type: str
    layers_back: int
    place: int | None


Form = tuple[tuple[str, str, tuple[object, ...]], ...]
"""For each node of a layer its pattern, its path below the layer, and what it reads."""


def _forms(container: str, layers: Mapping[str, Sequence[Line]], types: Mapping[str, str]) -> dict[str, Form]:
    """The form of every layer; layers with equal forms are identical."""
    owners: dict[str, tuple[int, int]] = {}
    for index, lines in enumerate(layers.values()):
        owners |= {line.defines: (index, place) for place, line in enumerate(lines)}
    readers: Counter[str] = Counter()
    for index, lines in enumerate(layers.values()):
        names = {name for line in lines for name in line.reads}
        readers.update(name for name in names if owners.get(name, (-1, 0))[0] != index)
    forms: dict[str, Form] = {}
    for index, (number, lines) in enumerate(layers.items()):
        start = len(f"{container}.{number}" if container else number)
        reads: dict[str, object] = {}
        for name in (name for line in lines for name in line.reads):
            owner, place = owners.get(name, (index - 1, None))
            if owner == index:
                reads[name] = place
            elif name in types and readers[name] == 1:
                reads.setdefault(name, Outside(len(reads), name[0] == "@", types[name], index - owner, place))
            else:
                reads[name] = (name, types.get(name, ""))
        forms[number] = tuple((line.pattern, line.path[start:], tuple(reads[name] for name in line.reads)) for line in lines)
    return {
        number: next((candidate for candidate in forms.values() if candidate != form and _stands_for(form, candidate)), form)
        for number, form in forms.items()
    }


def _stands_for(first: Form, form: Form) -> bool:
    """True when a layer differs from another only in that its input comes from outside all layers, as the first one's does."""
    return len(first) == len(form) and all(
        here[:2] == there[:2] and len(here[2]) == len(there[2]) and all(map(_same_input, here[2], there[2]))
        for here, there in zip(first, form, strict=True)
    )


def _same_input(first: object, other: object) -> bool:
    if isinstance(first, Outside) and isinstance(other, Outside) and first.place is None and other.layers_back == 1:
        return first == other._replace(place=None)
    return first == other


def _differences(usual: Form, form: Form) -> tuple[str, ...]:
    """The patterns that one form has more often than the other, else what they read; the first few."""
    views: tuple[Callable[[tuple[str, str, tuple[object, ...]]], str], ...] = (
        lambda line: line[0],
        lambda line: f"{line[0]} in {line[1].lstrip('.')}",
        lambda line: f"{line[0]}: {line[2]}",
    )
    for part in views:
        before, after = Counter(map(part, usual)), Counter(map(part, form))
        pairs = zip_longest((f"- {pattern}" for pattern in before - after), (f"+ {pattern}" for pattern in after - before))
        lines = [line for pair in pairs for line in pair if line is not None]
        if lines:
            more = len(lines) - _MOST_DIFFERENCES
            return (*lines[:_MOST_DIFFERENCES], *([f"and {more} more"] if more > 0 else []))
    return ("the same nodes in another order",)
