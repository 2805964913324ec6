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
from typing import Literal

from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Approximation
from lissom.compiler.transforms.pruning.budget import Amount
from lissom.compiler.transforms.pruning.prune import Criterion, UnitPruning
from lissom.compiler.transforms.pruning.units import head_sites


@dataclass(frozen=True)
class PruneHeads(Approximation):
    """Zeroes the attention heads that matter least, and refits what stays where there is calibration data.

    keep: the share of heads that stays, over 0 to 1; of key/value heads where queries are grouped.
    criterion: how heads are ranked; all but `magnitude` need calibration data. `auto` is `second-order` with data.
    scope: `global` ranks the heads of all layers together, `layer` takes the same share of each.
    round_to: the heads left in a layer are a multiple of this.
    protect: module paths that keep all heads, with `*` and `?`, divided by commas: `"encoder.layer.0,*.11"`.
    norm: the norm of weights that `magnitude` takes.
    """

    keep: float
    criterion: Criterion = "auto"
    scope: Literal["global", "layer"] = "global"
    round_to: int = 1
    protect: str = ""
    norm: Literal["l1", "l2"] = "l2"

    leaves_dead = True
    requires = (FLOATING_POINT_WEIGHTS,)

    def __post_init__(self) -> None:
        Amount(self.keep, self.scope, self.round_to)

    def run(self, edit: Editor) -> None:
        amount = Amount(self.keep, self.scope, self.round_to)
        UnitPruning("heads", amount, self.protect, self.criterion, self.norm).prune(edit, head_sites(edit))
