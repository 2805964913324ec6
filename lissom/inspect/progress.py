"""Progress of long work on standard error: a bar on a terminal, a line per slow stage anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lissom.inspect.terminal import Terminal

Report = Callable[[str, int, int], None]

_SECONDS_BETWEEN_LINES = 2.0


@contextmanager
def progress_bar(title: str) -> Generator[Report]:
    """A function that shows the running stage, how many stages are finished, and their total."""
    console = Terminal(stderr=True)
    if not console.is_terminal:
        yield _lines(title, console)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def report(what: str, finished: int, total: int) -> None:
            bar.update(task, description=f"{title}: {what}", completed=finished, total=total)

        yield report


def _lines(title: str, console: Console) -> Report:
    """Prints at most one line per stage; none within two seconds of the start or of the line before."""
    shown, printed = -1, time.monotonic()

    def report(what: str, finished: int, total: int) -> None:
        nonlocal shown, printed
        now = time.monotonic()
        if finished == shown or now - printed < _SECONDS_BETWEEN_LINES:
            return
        shown, printed = finished, now
        # Details of a stage, "quantize: observe, 3 of 20", are only shown by the bar.
        stage = what.partition(": ")[0]
        console.print(f"{title}: {stage:.100}", markup=False, highlight=False, soft_wrap=True)

    return report
