"""The program after a step of a history as a picture, and what differs from the program after another step."""

from __future__ import annotations

from lissom.compiler.pipeline.history import History
from lissom.errors import UnsupportedError
from lissom.inspect.lines import Line
from lissom.inspect.svg.heat import Heat
from lissom.inspect.svg.program import Compared, program_svg


def step_svg(name: str, history: History, step: int | None, only: str, compare: int | None, heat: Heat | None = None) -> str:
    """The picture; see `Report.to_svg`. Raises: UnsupportedError."""
    if heat is not None and compare is not None:
        raise UnsupportedError("a picture shows a heat or a comparison with another step; give heat= or compare=")
    index = len(history.steps) - 1 if step is None else step
    for item in (index, *([] if compare is None else [compare])):
        history.check_step(item)
    title = f"{name} as captured" if index == 0 else f"{name} after {index} {_pass(history, index)}"
    other = None
    if compare is not None:
        verb = "added" if compare < index else "removed"
        title += f", compared with {compare} {_pass(history, compare)}"
        lines = [Line.of(item) for item in history.texts[compare].split("\n")]
        other = Compared(lines, verb, history.facts_of(compare))
    return program_svg(history.texts[index], title, only=only, compared=other, facts=history.facts_of(index), heat=heat)


def _pass(history: History, index: int) -> str:
    return history.steps[index].spelling.partition("{")[0]
