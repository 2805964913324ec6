"""A program as an SVG picture: modules as frames, nodes as boxes, what reads what as curves; identical layers once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lissom.compiler.pipeline.history import NodeFacts
from lissom.errors import UnsupportedError, nearest
from lissom.inspect.lines import Line, input_types
from lissom.inspect.svg.canvas import CODE_WIDTH, LABEL_WIDTH, Canvas
from lissom.inspect.svg.heat import LEVELS, Heat
from lissom.inspect.svg.layout import Box, Piece, place
from lissom.inspect.svg.shown import MOST_NODES, Module, Shown, is_size, module_nodes, operator_of, shown

MARGIN = 16.0
_HEADER = 26.0
_NODE_HEIGHT = 38.0
_TITLE_HEIGHT = 52.0
_OUTPUT = "%"
"""Stands for the result: no module and no node has this name."""


@dataclass(frozen=True)
class Compared:
    """A program beside another one.

    Attributes:
        verb: what happens to a node that the other one lacks, `added` or `removed`.
        lines: of the other program.
        facts: of the other program.
    """

    lines: Sequence[Line]
    verb: str
    facts: Mapping[str, NodeFacts] = field(default_factory=dict[str, NodeFacts])


def program_svg(
    text: str,
    title: str,
    *,
    only: str = "",
    compared: Compared | None = None,
    facts: Mapping[str, NodeFacts] | None = None,
    heat: Heat | None = None,
    most: int = MOST_NODES,
) -> str:
    """The picture of a program's text, with at most `most` nodes.

    Args:
        only: the path of a module.
        facts: of the nodes of this program, for matching it with the other one.
        heat: what colors the nodes of a program that is not compared.

    Raises:
        UnsupportedError: if there is no such module.
    """
    lines = [Line.of(line) for line in text.split("\n")]
    status = {} if compared is None else statuses(lines, facts or {}, compared)
    part = shown(lines, only, status, most)
    if not part.keys and only:
        known = sorted({line.path for line in lines if line.path})
        raise UnsupportedError(f"{title} has no node in the module '{only}'{nearest(only, known) or '; try'} {_some(known)}")
    return Picture(lines, part, status, heat).svg(f"{title}, {only}" if only else title)


def _some(paths: Sequence[str]) -> str:
    listed = ", ".join(paths[:3])
    return f"one of {listed}{', …' if len(paths) > 3 else ''}" if paths else "the whole program, which has no modules"


def statuses(lines: Sequence[Line], facts: Mapping[str, NodeFacts], other: Compared) -> dict[str, str]:
    """For each node that the other program lacks or has in another form its status: `added`, `removed` or `changed`.

    Nodes are matched by name, or by the node that they replaced. A node changed if its text did, or a weight it reads.
    """
    theirs = {line.defines: line for line in other.lines if line.defines}
    renamed = {**_replaced(facts, theirs), **{name: mine for mine, name in _replaced(other.facts, _names(lines)).items()}}
    weights = {line.defines for line in lines if line.defines.startswith("@") and line.defines in theirs}
    touched = {name for name in weights if facts.get(name) != other.facts.get(name)}
    status: dict[str, str] = {}
    for line in lines:
        if not line.is_node:
            continue
        was = theirs.get(line.defines) or theirs.get(renamed.get(line.defines, ""))
        if was is None:
            status[line.defines] = other.verb
        elif not _equal(line, was, renamed) or not touched.isdisjoint(line.reads):
            status[line.defines] = "changed"
    return status


def _names(lines: Sequence[Line]) -> set[str]:
    return {line.defines for line in lines if line.is_node}


def _replaced(facts: Mapping[str, NodeFacts], others: Collection[str]) -> dict[str, str]:
    """The nodes whose names the other program lacks, by name, with the node there that each one replaced."""
    replaced: dict[str, str] = {}
    for name, fact in facts.items():
        before = f"%{fact.origin.replaces}"
        if fact.origin.replaces and name not in others and before in others and before not in facts:
            replaced.setdefault(name, before)
    return replaced


def _equal(line: Line, was: Line, renamed: Mapping[str, str]) -> bool:
    same = line.pattern == was.pattern and line.path == was.path and len(line.reads) == len(was.reads)
    return same and all(a in (b, renamed.get(b)) or b == renamed.get(a) for a, b in zip(line.reads, was.reads, strict=True))


def _nodes(count: int) -> str:
    return f"{count} {'node' if count == 1 else 'nodes'}"


class Picture:
    """Draws what is shown of a program."""

    def __init__(
        self,
        lines: Sequence[Line],
        part: Shown,
        status: Mapping[str, str],
        heat: Heat | None = None,
        canvas: Canvas | None = None,
    ) -> None:
        self.lines = {line.defines: line for line in lines if line.defines}
        self.part, self.status, self.heat = part, status, heat
        self.heats = {} if heat is None else heat.join(part.keys)
        self.hottest = max(self.heats.values(), default=0.0)
        self.modules: dict[str, Module] = {}
        self.inputs = input_types(lines)
        readers = [line for line in lines if line.defines not in part.keys and not is_size(line)]
        # In the order of the program, so that a program has one picture.
        self.results = [*dict.fromkeys(part.keys[name] for line in readers for name in _read(line) if name in part.keys)]
        self.canvas = canvas or Canvas()

    def svg(self, title: str) -> str:
        """The whole picture."""
        page = self.page()
        legend = self._legend()
        width = max(page.width, 1.25 * LABEL_WIDTH * len(title), LABEL_WIDTH * len(legend)) + 2 * MARGIN
        self.canvas.text(MARGIN, 24, title, "strong title")
        self.canvas.text(MARGIN, 42, legend, "quiet")
        self.draw(page, (width - page.width) / 2, _TITLE_HEIGHT)
        return self.canvas.svg(width, _TITLE_HEIGHT + page.height + MARGIN, title)

    def page(self) -> Box:
        """Everything that is drawn, in its place: what comes in, the modules and nodes, and the output."""
        root = self._box(self.part.root)
        sources = dict.fromkeys(source for source, _ in self.part.edges if source not in self.part.keys.values())
        edges = [*self.part.edges, *((name, _OUTPUT) for name in self.results)]
        outputs = [self._leaf(_OUTPUT)] if self.results else []
        page = Box("", items=[*map(self._leaf, sources), root, *outputs])
        if not self.part.root.path:
            page.items[len(sources) : len(sources) + 1] = root.items
        place(page, edges)
        return page

    def _legend(self) -> str:
        """The number of nodes, and of those that differ and those that are not drawn."""
        part = self.part
        counts = Counter(self.status[name] for name in part.keys if name in self.status)
        computes = "that computes sizes" if part.sizes == 1 else "that compute sizes"
        without = ((part.sizes, computes), (part.left_out, "for which there is no room"))
        words = [f"{counts[word]} {word}" for word in ("added", "removed", "changed") if counts[word]]
        words += [f"without {_nodes(count)} {which}" for count, which in without if count]
        words += [] if self.heat is None else [f"color: {self.heat.label}, at most {self.hottest:.3g}"]
        return ", ".join([_nodes(len(part.keys) + part.left_out + part.sizes), *words, "identical layers drawn once"])

    def _box(self, part: Module | str) -> Box:
        if isinstance(part, str):
            return self._leaf(part)
        self.modules[part.path] = part
        label = max(LABEL_WIDTH * len(_label(part)) + 24, 60)
        if not part.is_open:
            return Box(part.path, label, _NODE_HEIGHT)
        return Box(part.path, items=[self._box(inner) for inner in part.items], header=_HEADER, least=label)

    def _leaf(self, name: str) -> Box:
        return Box(name, CODE_WIDTH * max(map(len, self._words(name))) + 18, _NODE_HEIGHT)

    def _words(self, name: str) -> tuple[str, str]:
        """The two lines of a node or value."""
        line = self.lines.get(name)
        if name == _OUTPUT:
            return "output", ", ".join(sorted({self.lines[result].type for result in self.results if result in self.lines})[:2])
        if line is None or name not in self.part.keys:
            return name.removeprefix("%"), self.inputs.get(name.removeprefix("%"), "") if line is None else line.type
        module = self.part.names.get(name)
        return f"{module}: {operator_of(line)}" if module else operator_of(line), line.type

    def draw(self, box: Box, x: float, y: float) -> None:
        """Draw what is in a box that is at this place."""
        for inner in box.items:
            self._draw_item(inner, x + inner.x, y + inner.y)
        for piece in box.pieces:
            self.canvas.curve(_steps(piece, x, y), "edge again" if piece.again else "edge", arrow=piece.arrow)

    def _draw_item(self, box: Box, x: float, y: float) -> None:
        module, middle = self.modules.get(box.key), x + box.width / 2
        if module is None:
            line, first = self.lines.get(box.key), "strong" if box.key in self.part.keys else "quiet"
            kind = self.status.get(box.key, self._warmth(box.key) or "node") if box.key in self.part.keys else "value"
            about = "" if line is None else f"{_whole(line)}{self._figure(box.key)}"
            self.canvas.rect(x, y, box.width, box.height, kind, about=about)
            for height, words, look in zip((16, 30), self._words(box.key), (first, "quiet"), strict=True):
                self.canvas.text(middle, y + height, words, f"code {look}", anchor="middle")
            return
        about = f"{module.path}{self._figure(box.key)}"
        self.canvas.rect(x, y, box.width, box.height, "frame" if module.is_open else self._kind(module), about=about)
        if module.is_open:
            self.canvas.text(x + 10, y + 17, _label(module), "strong")
            self.draw(box, x, y)
            return
        self.canvas.text(middle, y + 16, _label(module), "strong", anchor="middle")
        self.canvas.text(
            middle, y + 30, f"{module_nodes(module)} nodes{' each' if module.members else ''}", "quiet", anchor="middle"
        )

    def _kind(self, module: Module) -> str:
        return "changed" if any(name in self.status for name in module.nodes) else self._warmth(module.path) or "folded"

    def _warmth(self, key: str) -> str:
        """The class of the color that shows the heat of a node or closed module; empty if it has none."""
        value = self.heats.get(key, 0.0)
        return f"heat{math.ceil(LEVELS * value / self.hottest)}" if value > 0 else ""

    def _figure(self, key: str) -> str:
        return f"\n{self.heat.label}: {self.heats[key]:.3g}" if self.heat is not None and key in self.heats else ""


def _read(line: Line) -> Sequence[str]:
    """The names that a node reads, or those of the result."""
    return line.reads if line.is_node else line.names if line.pieces[0].startswith("  return ") else ()


def _label(module: Module) -> str:
    return f"{module.label} ×{len(module.members)} identical" if module.members else module.label


def _whole(line: Line) -> str:
    """The text of a node."""
    names = [*line.names, ""]
    return "".join(f"{piece}{name}" for piece, name in zip(line.pieces, names, strict=True)).strip()


def _steps(piece: Piece, x: float, y: float) -> str:
    """The path of a piece of an edge: straight to the end of its rank, then a curve that starts and ends upright."""
    (left, top), (right, bottom) = piece.start, piece.end
    x0, y0, x1, y1, leave = (round(v, 1) for v in (x + left, y + top, x + right, y + bottom, y + piece.leave))
    bend = 40.0 if piece.again else (y1 - leave) / 2
    start = f"M{x0:g} {y0:g}" + (f"V{leave:g}" if leave > y0 else "")
    return f"{start}C{x0:g} {leave + bend:g} {x1:g} {y1 - bend:g} {x1:g} {y1:g}"
