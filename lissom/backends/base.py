"""What a backend is: passes that lower a program, and a way to build what runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from lissom.compiler.kinds import Pass
from lissom.compiler.program import Program
from lissom.compiler.samples import Sample

Executable = Callable[[Sequence[torch.Tensor]], Sequence[object]]
"""Flat inputs in the order of the program's placeholders; flat outputs."""


class Backend(ABC):
    """A way to run programs."""

    name: ClassVar[str]

    def lowering(self, device: torch.device) -> Sequence[Pass]:
        """Exact passes that bring a program on `device` into the form this backend runs fast; checked like any other."""
        return ()

    @abstractmethod
    def build(self, program: Program, example: Sample) -> Executable:
        """What runs the program; `example` are flat inputs of it.

        The executable keeps the program's weights and copies none it does not write.
        """
