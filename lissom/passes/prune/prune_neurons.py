"""Prune feed-forward neurons: zero the least important ones, and refit the rest to compensate.

A feed-forward is a sum over neurons, W₂ f(W₁ x) = Σ_i W₂[:, i] f(W₁[i] x). Neuron i is pruned by zeroing W₂[:, i];
`eliminate-dead`, which runs right after it, removes it. Criteria, with formulas and sources, are in
`lissom/compiler/transforms/pruning/importance.py`, and the refitting of the remaining weights in
`lissom/compiler/transforms/pruning/reconstruction.py`:

- `second-order` removes neurons one by one, each time the one that the others can compensate best, and then refits
  every layer that ends a branch to the original model, in the order of the program. It is what `auto` means
  with calibration data.
- `reconstruction` searches a mask by Fisher information and scales the remaining neurons. Kwon et al. 2022.
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
from lissom.compiler.transforms.pruning.units import neuron_sites


@dataclass(frozen=True)
class PruneNeurons(UnitPruning):
    """Zeroes the least important feed-forward neurons, and refits the rest to calibration data if given.

    Options are those of `UnitPruning`.
    """

    units: ClassVar[str] = "neurons"

    @classmethod
    def sites(cls, program: Program) -> Sequence[AmountSite]:
        return cls._amount_sites(neuron_sites(Editor(program, cls.name())))

    def run(self, edit: Editor) -> None:
        self.prune(edit, neuron_sites(edit))
