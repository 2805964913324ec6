"""A progress bar on a terminal, and nothing where output is piped."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Report = Callable[[str, int, int], None]


@contextmanager
def progress_bar(title: str) -> Generator[Report]:
    """A function that shows what is being done now, how many steps are finished, and of how many."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def report(what: str, finished: int, total: int) -> None:
            bar.update(task, description=f"{title}: {what}", completed=finished, total=total)

        yield report
