"""Prune attention heads: choose those that matter least, zero what reads them, and let the rest make up for them.

An attention is a sum over heads, Σ_h W_o[:, h] softmax(q_h k_hᵀ) v_h. Head h is pruned by zeroing its columns W_o[:, h];
`eliminate-dead`, which runs right after it, removes it. With grouped queries a key/value head goes with all query heads that
read it; where one key/value head serves all, query heads go one by one. Criteria, with formulas and sources, are in
`lissom/compiler/transforms/pruning/importance.py`, and what is done to the weights that stay in
`lissom/compiler/transforms/pruning/reconstruction.py`:

- `second-order` takes heads one after another, each time the one whose loss the others can make up for best, and then refits
  the output projection of every attention to the original model, in the order of the program. It is what `auto` means with
  calibration data.
- `reconstruction` searches a mask by Fisher information and scales the heads that stay. Kwon et al. 2022.
- `magnitude`, `wanda`, `gradient` and `taylor` choose and zero. `magnitude` needs no data, and is what `auto` means without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lissom.compiler.ir.editor import Editor
from lissom.compiler.transforms.pruning.prune import UnitPruning
from lissom.compiler.transforms.pruning.units import head_sites


@dataclass(frozen=True)
class PruneHeads(UnitPruning):
    """Zeroes the attention heads that matter least, and refits what stays where there is calibration data.

    Options are those of `UnitPruning`. Where queries are grouped, `keep` counts key/value heads.
    """

    units: ClassVar[str] = "heads"

    def run(self, edit: Editor) -> None:
        self.prune(edit, head_sites(edit))
