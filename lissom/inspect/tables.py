"""Histories, catalogues and diffs as rich tables and coloured text."""

from __future__ import annotations

import inspect as python_inspect
from collections.abc import Mapping
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lissom.compiler.pipeline.history import History, Step
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.pipeline.spelling import options_of, type_text

_PLAIN_WIDTH = 140


@dataclass(frozen=True, repr=False)
class Report:
    """What compiling did, for people: prints as a table, exports as JSON through `history`."""

    title: str
    history: History

    def __rich__(self) -> RenderableType:
        return history_table(self.title, self.history)

    def __str__(self) -> str:
        return plain(history_table(self.title, self.history))

    def __repr__(self) -> str:
        return f"<Report of {self.title}: {len(self.history.steps)} steps; print it to read them>"


def plain(item: RenderableType) -> str:
    """A rich table as text without colours, of a fixed width."""
    console = Console(width=_PLAIN_WIDTH, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(item)
    return captured.get()


def history_table(title: str, history: History) -> RenderableType:
    """One row a step: what it did, seconds with its checks, and nodes, megabytes, GFLOP and error where they changed.

    Below it stand the notes and what was checked.
    """
    notes = [note for step in history.steps for note in step.notes]
    below = Text("\n".join(["", *notes, _about_checks(history)]), style="table.caption")
    # Without edges, so that the longest name of a pass stays on one line of 80 columns.
    table = Table(
        title=Text(f"{title}\n"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False
    )
    table.add_column("#", justify="right")
    table.add_column("pass", overflow="fold", max_width=40)
    table.add_column("what it did", overflow="fold")
    scored = any(step.metric is not None for step in history.steps)
    for heading in ("s", "nodes", "MB", "GFLOP", "error", *(["metric"] if scored else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for before, step in zip([None, *history.steps], history.steps, strict=False):
        what = "" if step.index == 0 else step.summary
        row = [
            str(step.index),
            Text(step.spelling),
            Text(what),
            f"{step.seconds + step.check_seconds:.2f}",
            *_changed(before, step),
        ]
        row += ["" if step.relative_error is None else f"{step.relative_error:.0e}"]
        row += [("" if step.metric is None else f"{step.metric:.4g}")] if scored else []
        table.add_row(*row)
    return Group(table, below)


def _changed(before: Step | None, step: Step) -> list[str]:
    """Nodes, megabytes and GFLOP; a number that did not change is left out."""
    sizes = _sizes(step)
    if before is None:
        return sizes
    return ["" if new == old else new for new, old in zip(sizes, _sizes(before), strict=True)]


def _sizes(step: Step) -> list[str]:
    size = step.size
    return [str(size.nodes), f"{size.parameter_bytes / 1e6:.3g}", f"{size.flops / 1e9:.3g}"]


def _about_checks(history: History) -> str:
    words = {
        "numeric": "every exact step ran beside the one before and gave equal outputs",
        "structural": "form and types were checked after every step, numbers were not",
        "off": "nothing was checked",
    }
    seconds = sum(step.seconds + step.check_seconds for step in history.steps)
    return f"checks: {history.checks} ({words[history.checks]}); {seconds:.1f} s in all"


def passes_table(passes: Mapping[str, type[Pass]], recipes: Mapping[str, str]) -> Table:
    """Every pass with its kind, its options and what it does; then the recipes."""
    table = Table(title="passes", title_justify="left")
    table.add_column("pass", no_wrap=True)
    for heading in ("kind", "options", "what it does"):
        table.add_column(heading, overflow="fold")
    for name, item in passes.items():
        options = [f"{key}={type_text(hint)}" for key, hint in options_of(item).items()]
        table.add_row(name, item.kind, Text("\n".join(options) or "none"), Text(first_line(item)))
    table.add_section()
    for name, pipeline in recipes.items():
        table.add_row(name, "recipe", "", Text(pipeline))
    return table


def first_line(item: object) -> str:
    """The first line of an object's docstring."""
    return (python_inspect.getdoc(item) or "").partition("\n")[0]


def coloured_diff(diff: str) -> Text:
    """A unified diff with its added and removed lines coloured."""
    styles = {"+": "green", "-": "red", "@": "cyan"}
    text = Text()
    for line in diff.splitlines():
        text.append(line + "\n", style=styles.get(line[:1], ""))
    return text
