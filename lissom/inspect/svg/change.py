"""A picture of the changes of a step: the nodes that differ, before it and after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lissom.compiler.pipeline.history import History
from lissom.inspect.lines import Line
from lissom.inspect.svg.canvas import LABEL_WIDTH, Canvas
from lissom.inspect.svg.program import MARGIN, Compared, Picture, statuses
from lissom.inspect.svg.shown import Shown, is_size, shown

_MOST = 24
"""Nodes of each program."""
_TITLE = 34.0
_LEAST = 200.0
_WIDEST = 960.0
"""Wider programs are put below each other."""


def change_svg(history: History, step: int, name: str) -> str | None:
    """The nodes that a step removed, added or changed, with the values that they read; None if it changed no node's text.

    Args:
        step: 1 or more.
        name: of the step, for the title.

    Raises:
        UnsupportedError: if there is no such step.
    """
    history.check_step(step)
    both = step - 1, step
    if history.texts[both[0]] == history.texts[both[1]]:
        return None
    # A page shows the picture as an image, which has no texts for the pointer.
    canvas, pictures = Canvas(about=False), list[Picture]()
    lines = [[Line.of(line) for line in history.texts[index].split("\n")] for index in both]
    facts = [history.facts_of(index) for index in both]
    for side, verb in ((0, "removed"), (1, "added")):
        status = statuses(lines[side], facts[side], Compared(lines[1 - side], verb, facts[1 - side]))
        part = _shown([line for line in lines[side] if not line.is_node or line.defines in status or is_size(line)])
        pictures.append(Picture(lines[side], part, status, canvas=canvas))
    pages = [picture.page() for picture in pictures]
    titles = "before", f"after {name}"
    widths = [max(page.width, LABEL_WIDTH * len(title), _LEAST) for page, title in zip(pages, titles, strict=True)]
    below = sum(widths) > _WIDEST
    left, top = MARGIN, 0.0
    for picture, page, title, width in zip(pictures, pages, titles, widths, strict=True):
        canvas.text(left, top + 22, title, "strong")
        picture.draw(page, left + (width - page.width) / 2, top + _TITLE)
        left, top = (left, top + _TITLE + page.height) if below else (left + width + 2 * MARGIN, top)
    whole = (max(widths) + 2 * MARGIN, top) if below else (left - MARGIN, _TITLE + max(page.height for page in pages))
    return canvas.svg(whole[0], whole[1] + MARGIN, f"what {name} changes")


def _shown(changed: Sequence[Line]) -> Shown:
    """These nodes without frames of modules; the names of modules are with the only node of each."""
    plain = [replace(line, pieces=(*line.pieces[:-2], ""), names=line.names[:-1]) if line.path else line for line in changed]
    counts = Counter(line.path for line in changed)
    part = shown(plain, most=_MOST)
    part.names = {line.defines: line.path.rpartition(".")[2] for line in changed if line.path and counts[line.path] == 1}
    return part
