"""Places boxes within boxes, layer by layer, with the edges between them; no edge passes through a box.

Each box is laid out by itself: its items get ranks, so that edges lead downward, are ordered within their rank to lessen
crossings, and placed above what reads them (Sugiyama, Tagawa and Toda 1981, "Methods for Visual Understanding of Hierarchical
System Structures"). An edge that passes a rank has a lane of its own there, and one that leaves a box has a port at its border.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

_GAP = 14.0
_BETWEEN = 24.0
_PADDING = 12.0
_SWEEPS = 6


@dataclass
class Box:
    """A box.

    Attributes:
        key: of a box without items, what edges name.
        x: of its corner, within the box that holds it.
        y: likewise.
        header: the height of its label.
        least: the width that its label takes.
    """

    key: str
    width: float = 0.0
    height: float = 0.0
    items: list[Box] = field(default_factory=list["Box"])
    header: float = 0.0
    least: float = 0.0
    x: float = 0.0
    y: float = 0.0
    entries: dict[str, float] = field(default_factory=dict[str, float])
    exits: dict[str, float] = field(default_factory=dict[str, float])
    pieces: list[Piece] = field(default_factory=list["Piece"])

    def leaves(self) -> Iterator[str]:
        """The keys of all boxes without items in it, or its own."""
        if self.items:
            for inner in self.items:
                yield from inner.leaves()
        else:
            yield self.key


@dataclass(frozen=True)
class Piece:
    """A part of an edge within a box: from a point down to the end of its rank, then to another point.

    Attributes:
        leave: y where it leaves its rank.
        arrow: whether it ends at a box without items.
        again: whether it leads upward.
    """

    start: tuple[float, float]
    leave: float
    end: tuple[float, float]
    arrow: bool = False
    again: bool = False


@dataclass(eq=False)
class _Vertex:
    """Something with a place in a rank: an item, a port of the box, or a lane.

    Attributes:
        center: x of its middle.
    """

    order: int
    width: float = 0.0
    box: Box | None = None
    rank: int = 0
    center: float = 0.0
    above: list[_Vertex] = field(default_factory=list["_Vertex"])
    below: list[_Vertex] = field(default_factory=list["_Vertex"])

    def exit(self, source: str) -> float:
        """X where an edge from this source leaves."""
        offset = 0.0 if self.box is None else self.box.exits.get(source, self.width / 2) - self.width / 2
        return self.center + offset

    def entry(self, source: str) -> float:
        """X where an edge from this source arrives."""
        offset = 0.0 if self.box is None else self.box.entries.get(source, self.width / 2) - self.width / 2
        return self.center + offset


def place(box: Box, edges: Sequence[tuple[str, str]]) -> None:
    """Set sizes and places of all boxes in a box, and the pieces of the edges; keys that are not in it lie outside."""
    if not box.items:
        return
    inside = set(box.leaves())
    for inner in box.items:
        own = set(inner.leaves())
        place(inner, [edge for edge in edges if edge[0] in own or edge[1] in own])
    _Rows(box, [edge for edge in edges if edge[0] in inside or edge[1] in inside], inside).place()


class _Rows:
    """The ranks of one box."""

    def __init__(self, box: Box, edges: Iterable[tuple[str, str]], inside: set[str]) -> None:
        self.box = box
        self.items = [_Vertex(order, inner.width, inner) for order, inner in enumerate(box.items)]
        owner = {key: vertex for vertex, inner in zip(self.items, box.items, strict=True) for key in inner.leaves()}
        self.ins: dict[str, _Vertex] = {}
        self.outs: dict[str, _Vertex] = {}
        self.links: dict[tuple[str, _Vertex, _Vertex], None] = {}
        for source, target in edges:
            start = owner[source] if source in inside else self.ins.setdefault(source, _Vertex(-1))
            end = owner[target] if target in inside else self.outs.setdefault(source, _Vertex(len(self.items)))
            if start is not end:
                self.links[source, start, end] = None
        self.back = [link for link in self.links if link[1].order >= link[2].order]
        self.lanes: dict[tuple[str, int], _Vertex] = {}

    def place(self) -> None:
        self._rank()
        rows = self._rows()
        for sweep in range(_SWEEPS):
            for row in rows if sweep % 2 == 0 else rows[::-1]:
                self._order(row, sweep % 2 == 0)
        for sweep in range(2 * _SWEEPS):
            for row in rows if sweep % 2 == 0 else rows[::-1]:
                _shift(row, sweep % 2 == 0)
        self._write(rows)

    def _rank(self) -> None:
        """Each item below all that it reads; items that read nothing right above their first reader."""
        back = set(self.back)
        forward = sorted((link for link in self.links if link not in back), key=lambda link: (link[1].order, link[2].order))
        first = 1 if self.ins else 0
        for vertex in self.items:
            vertex.rank = first
        for _, start, end in sorted(forward, key=lambda link: link[2].order):
            end.rank = max(end.rank, start.rank + 1)
        reading = {end for _, _, end in forward}
        for vertex in self.items:
            readers = [end.rank for _, start, end in forward if start is vertex and end.box is not None]
            if readers and vertex not in reading:
                vertex.rank = min(readers) - 1
        last = max((vertex.rank for vertex in self.items), default=0) + 1
        for vertex in self.outs.values():
            vertex.rank = last

    def _rows(self) -> list[list[_Vertex]]:
        """The vertices by rank, with lanes for the edges that pass a rank."""
        rows: list[list[_Vertex]] = [[] for _ in range(2 + max(vertex.rank for vertex in self.items))]
        for vertex in (*self.ins.values(), *self.items, *self.outs.values()):
            rows[vertex.rank].append(vertex)
        back = set(self.back)
        for source, start, end in self.links:
            if (source, start, end) in back:
                continue
            at = start
            for rank in range(start.rank + 1, end.rank):
                lane = self.lanes.get((source, rank))
                if lane is None:
                    lane = self.lanes[source, rank] = _Vertex(start.order, rank=rank)
                    rows[rank].append(lane)
                    _connect(at, lane)
                at = lane
            _connect(at, end)
        return [row for row in rows if row]

    def _order(self, row: list[_Vertex], downward: bool) -> None:
        """Order a rank by the places of what its vertices read, or of what reads them."""
        for at, vertex in enumerate(row):
            vertex.center = float(at)
        means = {vertex: _mean(vertex, downward) for vertex in row}
        row.sort(key=lambda vertex: means[vertex])
        for at, vertex in enumerate(row):
            vertex.center = at - (len(row) - 1) / 2

    def _write(self, rows: Sequence[Sequence[_Vertex]]) -> None:
        """Set the places of the items, the ports and the pieces of the edges."""
        box = self.box
        left = min(vertex.center - vertex.width / 2 for row in rows for vertex in row)
        right = max(vertex.center + vertex.width / 2 for row in rows for vertex in row)
        box.width = max(right - left + 2 * _PADDING, box.least)
        shift = (box.width - (right - left)) / 2 - left
        y, tops, ends = box.header, dict[int, float](), dict[int, float]()
        for row in rows:
            rank, height = row[0].rank, max((vertex.box.height for vertex in row if vertex.box), default=0.0)
            ports = all(vertex.box is None and vertex.order in (-1, len(self.items)) for vertex in row)
            tops[rank] = y
            y += height
            ends[rank] = y
            y += _BETWEEN if not ports or rank == 0 else 0.0
            for vertex in row:
                vertex.center += shift
                if vertex.box is not None:
                    vertex.box.x, vertex.box.y = vertex.center - vertex.width / 2, tops[rank]
        box.height = y if self.outs else y - _BETWEEN + _PADDING
        box.entries = {source: vertex.center for source, vertex in self.ins.items()}
        box.exits = {source: vertex.center for source, vertex in self.outs.items()}
        if self.ins:
            tops[0] = ends[0] = 0.0
        box.pieces = list(self._pieces(tops, ends))

    def _pieces(self, tops: dict[int, float], ends: dict[int, float]) -> Iterator[Piece]:
        back, drawn = set(self.back), set[tuple[str, int]]()
        for source, start, end in self.links:
            bottom = tops[start.rank] + (start.box.height if start.box else 0.0)
            is_leaf = end.box is not None and not end.box.items
            if (source, start, end) in back:
                yield Piece((start.exit(source), bottom), bottom, (end.entry(source), tops[end.rank]), is_leaf, True)
                continue
            x, y, leave = start.exit(source), bottom, ends[start.rank]
            for rank in range(start.rank + 1, end.rank):
                lane = self.lanes[source, rank]
                if (source, rank) not in drawn:
                    drawn.add((source, rank))
                    yield Piece((x, y), leave, (lane.center, tops[rank]))
                x, y, leave = lane.center, tops[rank], ends[rank]
            yield Piece((x, y), leave, (end.entry(source), tops[end.rank]), is_leaf)


def _connect(above: _Vertex, below: _Vertex) -> None:
    above.below.append(below)
    below.above.append(above)


def _mean(vertex: _Vertex, downward: bool) -> float:
    others = vertex.above if downward else vertex.below
    return sum(other.center for other in others) / len(others) if others else vertex.center


def _shift(row: Sequence[_Vertex], downward: bool) -> None:
    """Move the vertices of a rank toward what they read, or what reads them, and apart, in their order."""
    wanted = [_mean(vertex, downward) for vertex in row]
    right = float("-inf")
    for vertex, center in zip(row, wanted, strict=True):
        vertex.center = max(center, right + vertex.width / 2)
        right = vertex.center + vertex.width / 2 + _GAP
    off = sum(vertex.center - center for vertex, center in zip(row, wanted, strict=True)) / len(row)
    for vertex in row:
        vertex.center -= off
