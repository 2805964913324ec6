"""Prune attention heads: zero the least important ones, and refit the rest to compensate.

An attention is a sum over heads, Σ_h W_o[:, h] softmax(q_h k_hᵀ) v_h. Head h is pruned by zeroing its columns W_o[:, h];
`eliminate-dead-heads` then removes it. With grouped queries a key/value head goes with all query heads that read it; where one
key/value head serves all, query heads go one by one. Criteria, with formulas and sources, are in
`lissom/compiler/transforms/pruning/importance.py`, and the refitting of the remaining weights in
`lissom/compiler/transforms/pruning/reconstruction.py`:

- `second-order` removes heads one by one, each time the one that the others can compensate best, and then refits
  the output projection of every attention to the original model, in the order of the program. It is what `auto` means with
  calibration data.
- `reconstruction` searches a mask by Fisher information and scales the remaining heads. Kwon et al. 2022.
- `magnitude`, `wanda`, `gradient` and `taylor` only zero. `magnitude` needs no data; `auto` means it where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Approximation
from lissom.compiler.transforms.pruning.budget import Amount
from lissom.compiler.transforms.pruning.prune import Criterion, UnitPruning
from lissom.compiler.transforms.pruning.units import head_sites


@dataclass(frozen=True)
class PruneHeads(Approximation):
    """Zeroes the least important attention heads, and refits the rest to calibration data if given.

    keep: fraction of heads to keep, above 0 and up to 1; of key/value heads in grouped-query attention.
    criterion: how heads are ranked; all but `magnitude` need calibration data. `auto` is `second-order` with data.
    scope: `global` ranks the heads of all layers together, `layer` prunes the same fraction of each.
    round_to: the number of heads kept in a layer is a multiple of this.
    protect: module paths whose heads are all kept, with `*` and `?`, separated by commas: `"encoder.layer.0,*.11"`.
    norm: the weight norm of the criterion `magnitude`.
    """

    keep: float
    criterion: Criterion = "auto"
    scope: Literal["global", "layer"] = "global"
    round_to: int = 1
    protect: str = ""
    norm: Literal["l1", "l2"] = "l2"

    requires = (FLOATING_POINT_WEIGHTS,)

    def __post_init__(self) -> None:
        Amount(self.keep, self.scope, self.round_to)

    def run(self, edit: Editor) -> None:
        amount = Amount(self.keep, self.scope, self.round_to)
        UnitPruning("heads", amount, self.protect, self.criterion, self.norm).prune(edit, head_sites(edit))
