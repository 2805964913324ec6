"""Prune feed-forward neurons: choose those that matter least, zero what reads them, and let the rest make up for them.

A feed-forward is a sum over neurons, W₂ f(W₁ x) = Σ_i W₂[:, i] f(W₁[i] x). Neuron i is pruned by zeroing W₂[:, i];
`eliminate-dead`, which runs right behind, removes it. Criteria, with formulas and sources, are in
`lissom/compiler/transforms/pruning/importance.py`, and what is done to the weights that stay in
`lissom/compiler/transforms/pruning/reconstruction.py`:

- `second-order` takes neurons one after another, each time the one whose loss the others can make up for best, and then refits
  every layer that ends a branch to the original model, in the order of the program. It is what `auto` means
  with calibration data.
- `reconstruction` searches a mask by Fisher information and scales the neurons that stay. Kwon et al. 2022.
- `magnitude`, `wanda`, `gradient` and `taylor` choose and zero. `magnitude` needs no data, and is what `auto` means without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lissom.compiler.ir.editor import Editor
from lissom.compiler.transforms.pruning.prune import UnitPruning
from lissom.compiler.transforms.pruning.units import neuron_sites


@dataclass(frozen=True)
class PruneNeurons(UnitPruning):
    """Zeroes the feed-forward neurons that matter least, and refits what stays where there is calibration data.

    Options are those of `UnitPruning`.
    """

    units: ClassVar[str] = "neurons"

    def run(self, edit: Editor) -> None:
        self.prune(edit, neuron_sites(edit))
