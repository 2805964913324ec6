"""Prune feed-forward neurons: zero the least important ones, and refit the rest to compensate.

A feed-forward is a sum over neurons, W₂ f(W₁ x) = Σ_i W₂[:, i] f(W₁[i] x). Neuron i is pruned by zeroing W₂[:, i];
`eliminate-dead-neurons` then removes it. Criteria, with formulas and sources, are in
`lissom/compiler/transforms/pruning/importance.py`, and the refitting of the remaining weights in
`lissom/compiler/transforms/pruning/reconstruction.py`:

- `second-order` removes neurons one by one, each time the one that the others can compensate best, and then refits
  every layer that ends a branch to the original model, in the order of the program. It is what `auto` means
  with calibration data.
- `reconstruction` searches a mask by Fisher information and scales the remaining neurons. Kwon et al. 2022.
- `magnitude`, `wanda`, `gradient` and `taylor` only zero. `magnitude` needs no data; `auto` means it where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Approximation
from lissom.compiler.transforms.pruning.budget import Amount
from lissom.compiler.transforms.pruning.prune import Criterion, UnitPruning
from lissom.compiler.transforms.pruning.units import neuron_sites


@dataclass(frozen=True)
class PruneNeurons(Approximation):
    """Zeroes the least important feed-forward neurons, and refits the rest to calibration data if given.

    keep: fraction of neurons to keep, above 0 and up to 1.
    criterion: how neurons are ranked; all but `magnitude` need calibration data. `auto` is `second-order` with data.
    scope: `global` ranks the neurons of all layers together, `layer` prunes the same fraction of each.
    round_to: the number of neurons kept in a layer is a multiple of this.
    protect: module paths whose neurons are all kept, with `*` and `?`, separated by commas: `"encoder.layer.0,*.11"`.
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
        UnitPruning("neurons", amount, self.protect, self.criterion, self.norm).prune(edit, neuron_sites(edit))
