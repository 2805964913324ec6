"""Pictures of the program after a step of a history, or of any program, and of what differs from another one."""

from __future__ import annotations

from os import PathLike

from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import History, node_facts
from lissom.errors import UnsupportedError
from lissom.inspect.lines import Line
from lissom.inspect.svg.heat import Heat
from lissom.inspect.svg.program import Compared, program_svg
from lissom.io.files import check_path, write_whole


def step_svg(name: str, history: History, step: int | None, only: str, compare: int | None, heat: Heat | None = None) -> str:
    """The picture; see `Report.to_svg`. Raises UnsupportedError."""
    if heat is not None and compare is not None:
        raise UnsupportedError("a picture shows a heat or a comparison with another step; give heat= or compare=")
    index = len(history.steps) - 1 if step is None else step
    for checked in (index, *([] if compare is None else [compare])):
        history.check_step(checked)
    title = f"{name} as captured" if index == 0 else f"{name} after {index} {_pass(history, index)}"
    other = None
    if compare is not None:
        verb = "added" if compare < index else "removed"
        title += f", compared with {compare} {_pass(history, compare)}"
        lines = [Line.of(line) for line in history.texts[compare].split("\n")]
        other = Compared(lines, verb, history.facts_of(compare))
    return program_svg(history.texts[index], title, only=only, compared=other, facts=history.facts_of(index), heat=heat)


def draw(program: Program, path: str | PathLike[str] | None = None, *, only: str = "", compare: Program | None = None) -> str:
    """A program as a picture, without a report: an SVG file, as `report.to_svg` draws it.

    Args:
        path: where to write it, if given.
        only: the path of a module, `encoder.layer.0`.
        compare: an earlier program; nodes that it lacks are marked as added, those that differ as changed.

    Raises:
        UnsupportedError: if there is no such module.
        ArtifactError: if the file cannot be written.

    Examples:
        >>> import torch, lissom
        >>> program = lissom.optimize(torch.nn.Linear(4, 2), torch.ones(3, 4)).program
        >>> "linear" in lissom.draw(program)
        True
    """
    other = None
    if compare is not None:
        other = Compared([Line.of(line) for line in compare.text().split("\n")], "added", node_facts(compare))
    picture = program_svg(program.text(), program.name, only=only, compared=other, facts=node_facts(program))
    if path is not None:
        write_whole(check_path(path), picture)
    return picture


def _pass(history: History, index: int) -> str:
    return history.steps[index].spelling.partition("{")[0]
