"""Run items of work in child processes, so that a crash or a hang costs one item only."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

STARTING_SECONDS = 600.0
"""Seconds a child process may take before it starts its first item."""
Tell = Callable[[object], None]
Prepare = Callable[[], Callable[[Any, Tell], None]]
"""Called once in a child process; returns the function that works on an item and reports what it finds."""
Late = Callable[[BaseProcess, float], bool]
"""True if a child process that has worked on an item for this many seconds is to be killed."""


@dataclass
class Result:
    """The result of an item.

    told: what the child reported. seconds: since the child started the item. late: the child was killed for taking too long.
    code: the exit code of a child that ended before the item was done, else None.
    """

    item: Any
    told: list[Any]
    seconds: float
    late: bool = False
    code: int | None = None


@dataclass
class Child:
    """A child process that works through items and ends; without items it waits for `give`.

    method: `fork`, which starts at once, or `spawn`, for a process that shares nothing with this one.
    """

    prepare: Prepare
    items: Sequence[object] = ()
    method: str = "fork"
    ready: bool = False
    _told: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        context = multiprocessing.get_context(self.method)
        self.connection, other = context.Pipe()
        self.process: BaseProcess = context.Process(  # pyright: ignore[reportAttributeAccessIssue]
            target=_work, args=(self.prepare, self.items, other), daemon=True
        )
        self.process.start()
        other.close()
        self.left, self._since = list(self.items), time.monotonic()

    def give(self, item: object) -> None:
        """Give the process one more item."""
        self.left.append(item)
        self._since = time.monotonic()
        self.connection.send(item)

    def results(self, late: Late) -> Generator[Result]:
        """The results of items since the last call. The last one is the item during which the process ended, if it did."""
        # Checked first: the messages of a process that has ended can still be read.
        running = self.process.is_alive()
        try:
            while self.connection.poll():
                kind, told = self.connection.recv()
                if kind == "told":
                    self._told.append(told)
                    continue
                if kind == "done":
                    yield self._result()
                self.ready, self._since = True, time.monotonic()
        except (EOFError, ConnectionResetError):
            running = False
        seconds = time.monotonic() - self._since
        if self.left and not running:
            self.process.join()
            yield self._result(code=self.process.exitcode)
        elif self.left and (late(self.process, seconds) if self.ready else seconds > STARTING_SECONDS):
            self.close()
            yield self._result(late=True)

    def _result(self, **how: Any) -> Result:
        told, self._told = self._told, []
        return Result(self.left.pop(0), told, time.monotonic() - self._since, **how)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def run_apart(blocks: Iterator[Sequence[object]], prepare: Prepare, jobs: int, late: Late) -> Generator[Result]:
    """Yield results of items as they finish. blocks: items that share a process until one ends it; jobs: parallel processes."""
    running: list[Child] = []
    try:
        while True:
            while len(running) < jobs and (block := next(blocks, None)) is not None:
                running.append(Child(prepare, block))
            if not running:
                return
            wait([child.connection for child in running], timeout=0.5)
            for child in list(running):
                result = None
                for result in child.results(late):
                    yield result
                lost = result is not None and (result.late or result.code is not None)
                if child.left and not lost:
                    continue
                running.remove(child)
                child.process.join()
                child.connection.close()
                if child.left:
                    running.append(Child(prepare, child.left))
    finally:
        for child in running:
            child.close()


def _work(prepare: Prepare, items: Iterable[object], connection: Connection) -> None:
    work = prepare()
    connection.send(("ready", None))
    for item in items or iter(connection.recv, None):
        work(item, lambda told: connection.send(("told", told)))
        connection.send(("done", None))
