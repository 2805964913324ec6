"""What a backend is: passes that lower a program, and a way to build what runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from lissom.compiler.kinds import Pass
from lissom.compiler.program import Program

Executable = Callable[[Sequence[torch.Tensor]], Sequence[object]]
"""Flat inputs in the order of the program's placeholders; flat outputs."""


class Backend(ABC):
    """A way to run programs.

    lowering: exact passes that bring a program into the form this backend runs fast; they are run and checked like any other.
    """

    name: ClassVar[str]
    lowering: ClassVar[tuple[Pass, ...]] = ()

    @abstractmethod
    def build(self, program: Program) -> Executable:
        """What runs the program. The executable keeps the program's weights and copies none it does not write."""
