"""Executables that several steps of a compile need: each program is built once for a backend."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import NamedTuple

from lissom.backends.base import Backend, Executable
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample


class Build(NamedTuple):
    """The executable of a program, and the seconds that the backend took for it."""

    backend: Backend
    program: Program
    executable: Executable
    seconds: float


class Builds:
    """The executables of one compile. A program whose executable is kept must not change."""

    def __init__(self) -> None:
        self._kept: list[Build] = []

    def build(self, backend: Backend, program: Program, example: Sample) -> Build:
        """The executable of the program, built unless it is kept. Raises what the backend raises."""
        for kept in self._kept:
            if kept.backend is backend and kept.program is program:
                return kept
        started = time.perf_counter()
        executable = backend.build(program, example)
        self._kept.append(Build(backend, program, executable, time.perf_counter() - started))
        return self._kept[-1]

    def keep(self, programs: Collection[Program]) -> None:
        """Forget the executables of all other programs."""
        self._kept = [kept for kept in self._kept if any(kept.program is program for program in programs)]
