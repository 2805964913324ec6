"""The time of a search, and its progress on a terminal."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from lissom.inspect.terminal import Terminal


@dataclass
class Clock:
    """The seconds of a search, and what it does.

    Attributes:
        best: the best program so far, in words.
        begun: the seconds before the tables, which do not count for fractions.
    """

    seconds: float
    best: str = ""
    begun: float = 0.0
    _started: float = field(default_factory=time.monotonic)
    _bar: Progress | None = None
    _task: TaskID | None = None

    @property
    def passed(self) -> float:
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.seconds - self.passed

    def begin(self) -> None:
        """Fractions are those of the time from now on."""
        self.begun = self.passed

    def until(self, fraction: float) -> float:
        """Seconds until this fraction of the time is over; negative after that."""
        return self.begun + fraction * (self.seconds - self.begun) - self.passed

    def within(self, fraction: float) -> bool:
        """True if less than this fraction of the time has passed."""
        return self.until(fraction) > 0

    def show(self, stage: str) -> None:
        """Show the stage on a terminal, with the best so far and the time left."""
        if self._bar is not None and self._task is not None:
            minutes, seconds = divmod(max(0, round(self.left)), 60)
            best = f" · best: {self.best}" if self.best else ""
            shown = f"tune: {stage}{best} · {minutes}:{seconds:02} left"
            self._bar.update(self._task, description=shown, completed=min(self.passed, self.seconds))

    @contextmanager
    def shown(self) -> Generator[None]:
        """Show the progress inside; nothing where standard error is no terminal."""
        console = Terminal(stderr=True)
        if not console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=20))
        with Progress(*columns, console=console, transient=True) as bar:
            self._bar, self._task = bar, bar.add_task("tune", total=self.seconds)
            try:
                yield
            finally:
                self._bar = None
