"""Prune attention heads: zero the least important ones, and refit the rest to compensate.

An attention is a sum over heads, Σ_h W_o[:, h] softmax(q_h k_hᵀ) v_h. Head h is pruned by zeroing its columns W_o[:, h];
`eliminate-dead`, which runs right after it, removes it. With grouped queries a key/value head is pruned with all query heads
that read it; with a single key/value head, query heads are pruned one by one. Criteria, with formulas and sources, are in
`lissom/compiler/transforms/pruning/importance.py`, and the refitting of the remaining weights in
`lissom/compiler/transforms/pruning/reconstruction.py`:

- `second-order` removes heads one by one, each time the one that the others can compensate best, and then refits
  the output projection of every attention to the original model, in the order of the program. It is what `auto` means with
  calibration data.
- `reconstruction` searches a mask by Fisher information and scales the remaining heads. Kwon et al. 2022.
- `magnitude`, `wanda`, `gradient` and `taylor` only zero. `magnitude` needs no data; `auto` means it where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lissom.compiler.analysis.amounts import AmountSite
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.transforms.pruning.prune import UnitPruning
from lissom.compiler.transforms.pruning.units import head_sites


@dataclass(frozen=True)
class PruneHeads(UnitPruning):
    """Zeroes the least important attention heads, and refits the rest to calibration data if given.

    Options are those of `UnitPruning`. Where queries are grouped, `keep` and `amounts` count key/value heads.
    """

    units: ClassVar[str] = "heads"

    @classmethod
    def sites(cls, program: Program) -> Sequence[AmountSite]:
        return cls._amount_sites(head_sites(Editor(program, cls.name())))

    def run(self, edit: Editor) -> None:
        self.prune(edit, head_sites(edit))
