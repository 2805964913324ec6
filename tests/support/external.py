"""A backend as another package has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from lissom.backends.base import Backend, Executable
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample


@dataclass(frozen=True)
class Plain(Backend):
    """Runs the program node by node. note: any value."""

    note: object = 1

    name: ClassVar[str] = "plain"

    def build(self, program: Program, example: Sample) -> Executable:
        def run(inputs: Sequence[torch.Tensor]) -> Sequence[object]:
            with torch.inference_mode():
                return program.run(inputs)

        return run

    def save_files(self, executable: Executable, folder: Path) -> None:
        (folder / "plain.txt").write_text("nothing")

    def load_executable(self, program: Program, folder: Path) -> Executable:
        assert (folder / "plain.txt").read_text() == "nothing"
        return self.build(program, [])
