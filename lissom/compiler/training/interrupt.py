"""Ctrl-C as a flag, so that a run ends between two steps, with weights and optimizer state that belong together."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Self


class Interrupt:
    """Notes the first Ctrl-C inside its block; the second raises KeyboardInterrupt as usual.

    Only the main thread gets signals, and a handler of the caller's own stays.

    Attributes:
        seen: whether there was one.
    """

    def __init__(self) -> None:
        self.seen = False
        self._mine = False

    def __enter__(self) -> Self:
        default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        self._mine = default and threading.current_thread() is threading.main_thread()
        if self._mine:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            signal.default_int_handler(number, frame)
        self.seen = True
