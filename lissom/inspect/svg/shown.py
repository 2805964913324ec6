"""The parts of a program in a picture: modules as boxes, identical layers once, inner modules open as long as there is room."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lissom.inspect.folding import ranges
from lissom.inspect.identical_layers import identical_layers
from lissom.inspect.lines import Line

MOST_NODES = 200
"""The most nodes and closed modules of a picture."""


@dataclass
class Module:
    """A module with the names of its nodes and its inner modules, in the order of their first nodes.

    Attributes:
        members: the numbers of the layers that it stands for; empty for a module that stands for itself.
        nodes: in program order, those of inner modules included; every one is shown, or stands behind a closed module.
    """

    path: str
    label: str = ""
    items: list[Module | str] = field(default_factory=list["Module | str"])
    nodes: list[str] = field(default_factory=list[str])
    members: tuple[str, ...] = ()
    is_open: bool = False

    @property
    def inner(self) -> list[Module]:
        return [part for part in self.items if isinstance(part, Module)]


@dataclass
class Shown:
    """The part of a program that a picture shows.

    Attributes:
        root: the whole program, or one module.
        keys: for every node below the root what shows it: its own name, that of its twin in an identical layer, or the path of
            a closed module.
        names: for nodes that are all of a module, the name of the module.
        sizes: nodes that compute sizes, which are not shown.
        left_out: nodes for which there is no room.
    """

    root: Module
    keys: Mapping[str, str]
    edges: Sequence[tuple[str, str]]
    names: Mapping[str, str]
    sizes: int = 0
    left_out: int = 0


def shown(lines: Sequence[Line], only: str = "", status: Mapping[str, str] | None = None, most: int = MOST_NODES) -> Shown:
    """The modules and nodes to draw, at most `most`.

    Args:
        only: the path of a module; all by default.
        status: of nodes, by name; layers with other statuses are not folded together.
    """
    below = [line for line in lines if line.is_node and (not only or line.path == only or line.path.startswith(f"{only}."))]
    sizes = {line.defines for line in lines if is_size(line)}
    inside = [line for line in below if line.defines not in sizes]
    root, modules = _tree(inside, only)
    folds = _Folds()
    for container, groups in identical_layers(lines).items():
        if container in modules:
            for group in groups:
                folds.fold(modules[container], group.members, status or {})
    names: dict[str, str] = {}
    _join(root, names)
    left_out = _open(root, most)
    keys = folds.resolved(dict(_keys(root)))
    edges = [edge for edge in _edges(inside, keys, folds) if edge[0] not in sizes]
    return Shown(root, keys, edges, names, len(below) - len(inside), left_out)


def _tree(lines: Sequence[Line], only: str) -> tuple[Module, dict[str, Module]]:
    """The modules of the nodes below a path, and all of them by path."""
    root = Module(only, only)
    modules = {only: root}
    for line in lines:
        at = root
        at.nodes.append(line.defines)
        rest = line.path.removeprefix(only).removeprefix(".") if only else line.path
        for part in rest.split(".") if rest else ():
            path = f"{at.path}.{part}" if at.path else part
            if path not in modules:
                modules[path] = Module(path, part)
                at.items.append(modules[path])
            at = modules[path]
            at.nodes.append(line.defines)
        at.items.append(line.defines)
    return root, modules


@dataclass
class _Folds:
    """The nodes that have a twin in the layer that is shown, and the layers of every folded node, by their container."""

    twins: dict[str, str] = field(default_factory=dict[str, str])
    layers: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict[str, "dict[str, tuple[str, str]]"])

    def fold(self, container: Module, numbers: Sequence[str], status: Mapping[str, str]) -> None:
        """Keep one of these layers, if they have equal statuses, and one more for each other sequence of statuses."""
        modules = {module.path.rpartition(".")[2]: module for module in container.inner}
        groups: dict[tuple[str, ...], list[str]] = {}
        for number in numbers:
            if number in modules:
                groups.setdefault(tuple(status.get(name, "") for name in modules[number].nodes), []).append(number)
        for members in groups.values():
            shown_one = modules[members[0]]
            if len(members) < 2:
                continue
            shown_one.members = tuple(members)
            shown_one.label = ranges([int(member) for member in members])
            for member in members:
                for name, twin in zip(modules[member].nodes, shown_one.nodes, strict=True):
                    self.layers.setdefault(name, {})[container.path] = (members[0], member)
                    if member != members[0]:
                        self.twins.setdefault(name, twin)
                if member != members[0]:
                    container.items.remove(modules[member])

    def resolved(self, keys: Mapping[str, str]) -> dict[str, str]:
        """The keys of the nodes that have one, and of their twins."""
        resolved = dict(keys)
        for name, twin in self.twins.items():
            while twin not in keys and twin in self.twins:
                twin = self.twins[twin]
            if twin in keys:
                resolved[name] = keys[twin]
        return resolved

    def are_apart(self, first: str, other: str) -> bool:
        """True for nodes of two layers that are folded into one."""
        mine, theirs = self.layers.get(first, {}), self.layers.get(other, {})
        return any(path in theirs and theirs[path][0] == group and theirs[path][1] != at for path, (group, at) in mine.items())


def _join(module: Module, names: dict[str, str]) -> None:
    """Join modules that hold nothing but another module with it, `encoder.layer`, and those of one node with the node."""
    for index, part in enumerate(module.items):
        while isinstance(part, Module) and len(part.items) == 1 and not part.members:
            (inner,) = part.items
            if isinstance(inner, Module):
                inner.label = f"{part.label}.{inner.label}"
            else:
                names[inner] = part.label
            part = inner
        module.items[index] = part
        if isinstance(part, Module):
            _join(part, names)


def _open(root: Module, most: int) -> int:
    """Open modules from the outside in as long as there is room; returns how many nodes of the root find none."""
    root.is_open = True
    left_out = sum(module_nodes(part) for part in root.items[most:])
    del root.items[most:]
    count, level = len(root.items), root.inner
    while level:
        following: list[Module] = []
        for module in level:
            if count - 1 + len(module.items) <= most:
                module.is_open = True
                count += len(module.items) - 1
                following += module.inner
        level = following
    return left_out


def module_nodes(part: Module | str) -> int:
    """The number of nodes of an item, those of one layer where layers are folded."""
    return len(part.nodes) if isinstance(part, Module) else 1


def _keys(module: Module) -> Iterator[tuple[str, str]]:
    for part in module.items:
        if isinstance(part, str):
            yield part, part
        elif part.is_open:
            yield from _keys(part)
        else:
            yield from ((name, part.path) for name in part.nodes)


def _edges(lines: Sequence[Line], keys: Mapping[str, str], folds: _Folds) -> list[tuple[str, str]]:
    """Edges from drawn items to their readers, once each; values from outside have their own names."""
    edges: dict[tuple[str, str], None] = {}
    without_room = {line.defines for line in lines} - keys.keys()
    for line in lines:
        target = keys.get(line.defines)
        if target is None:
            continue
        for name in line.reads:
            source = keys.get(name, name)
            if name[0] == "%" and source != target and name not in without_room and not folds.are_apart(name, line.defines):
                edges[source, target] = None
    return list(edges)


def is_size(line: Line) -> bool:
    """True for a node that computes a size."""
    return line.is_node and line.type.startswith("int")


_OPERATOR = re.compile(r" = (?:aten\.|lissom\.|operator\.)?([\w.]+)\(")


def operator_of(line: Line) -> str:
    """The operator of a node, without its namespace: `linear`."""
    match = _OPERATOR.search(line.pieces[1])
    return match[1] if match else line.pattern
