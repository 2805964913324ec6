"""Remove the units that contribute nothing: branches of layers, experts, attention heads, neurons, hidden channels, token ids.

A dead unit is removed from every weight that has it, and constant sizes are updated. Branches are removed first, because their
inputs may become unused; channels last, because removed heads and neurons no longer read or write any:

    layers      x + f(x) = x                                    where f(x) is zero whatever x is
    experts     topk(x Wᵀ)                                      experts whose scores are masked are never chosen
    heads       softmax(Q Kᵀ) V Wₒ = Σ softmax(Qₕ Kₕᵀ) Vₕ Wₒ[h] a term with Wₒ[h] = 0 or Vₕ = 0
    neurons     W₂ f(W₁ x) = Σ W₂[:, i] f(W₁[i] x)              a term with W₂[:, i] = 0 or f(W₁[i] x) = 0
    hidden      channels of the residual stream that every layer writes zeros to
    vocabulary  rows of token ids that inputs are mapped away from, and whose logits are masked

Li et al. 2017, Pruning Filters for Efficient ConvNets, §3.1, https://arxiv.org/abs/1608.08710, for the removal of both sides
of a unit; Michel, Levy, Neubig 2019, Are Sixteen Heads Really Better than One?, §2.2, https://arxiv.org/abs/1905.10650; Xia et
al. 2023, Sheared LLaMA, §2.1, https://arxiv.org/abs/2310.06694. Inputs are taken to be finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.errors import UnsupportedError
from lissom.passes.prune.eliminate_dead.experts import eliminate_experts
from lissom.passes.prune.eliminate_dead.heads import eliminate_heads
from lissom.passes.prune.eliminate_dead.hidden import eliminate_hidden
from lissom.passes.prune.eliminate_dead.layers import eliminate_layers
from lissom.passes.prune.eliminate_dead.neurons import eliminate_neurons
from lissom.passes.prune.eliminate_dead.vocabulary import eliminate_vocabulary

_KINDS = {
    "layers": eliminate_layers,
    "experts": eliminate_experts,
    "heads": eliminate_heads,
    "neurons": eliminate_neurons,
    "hidden": eliminate_hidden,
    "vocabulary": eliminate_vocabulary,
}
"""The kinds of units, in the order in which they are removed."""


@dataclass(frozen=True)
class EliminateDead(Rewrite):
    """Removes layers, experts, attention heads, neurons, hidden channels and token ids that contribute nothing.

    It runs automatically after every pass that prunes.

    Attributes:
        units: the kinds of units to remove, of `layers`, `experts`, `heads`, `neurons`, `hidden` and `vocabulary`, all by
            default: `[heads,neurons]`.
    """

    units: tuple[Literal["layers", "experts", "heads", "neurons", "hidden", "vocabulary"], ...] = (
        "layers",
        "experts",
        "heads",
        "neurons",
        "hidden",
        "vocabulary",
    )

    def __post_init__(self) -> None:
        wrong = next((kind for kind in self.units if kind not in _KINDS), None)
        if wrong is not None:
            raise UnsupportedError(f"eliminate-dead knows no units '{wrong}'; allowed are {', '.join(_KINDS)}")

    def run(self, edit: Editor) -> None:
        for kind, eliminate in _KINDS.items():
            if kind in self.units:
                eliminate(edit)
                edit.program.drop_dead()
