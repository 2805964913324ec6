"""Writing tables to terminals and pipes, and coloured diffs."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lissom.inspect.terminal import Terminal

_WIDTH = 80


def plain(table: RenderableType, width: int = _WIDTH) -> str:
    """A table as text, without colours and trailing spaces."""
    console = Terminal(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def plain_table(title: str | None = None, caption: str | None = None) -> Table:
    """A table without columns and edges, in the common style: the longest name of a pass fits on a line of 80 columns."""
    return Table(
        title=None if title is None else Text(title),
        caption=None if caption is None else Text(f"\n{caption}"),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )


def show(*items: RenderableType) -> None:
    """Print tables to standard output: with rich on a terminal, as `plain` text in a pipe."""
    console = Terminal()
    if console.is_terminal:
        console.print(*items, sep="\n")
    else:
        print(plain(Group(*items), console.width), end="")


def coloured_diff(diff: str) -> Text:
    """A unified diff with its added and removed lines coloured."""
    styles = {"+": "green", "-": "red", "@": "cyan"}
    text = Text()
    for line in diff.splitlines():
        text.append(line + "\n", style=styles.get(line[:1], ""))
    return text
