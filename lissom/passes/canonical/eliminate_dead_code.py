"""Remove the nodes whose results nothing reads, and the weights no node reads.

The same clean-up runs after every pass; this pass shows dead code of the captured program in the history.
"""

from __future__ import annotations

from dataclasses import dataclass

from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import Rewrite


@dataclass(frozen=True)
class EliminateDeadCode(Rewrite):
    """Removes operators whose results are never used, and weights that are never read."""

    def run(self, edit: Editor) -> None:
        edit.rewritten += edit.program.drop_dead()
