"""Rotate activations: give channels another orthogonal basis, in which they are quantized or pruned at less loss.

A few channels of keys, values and the residual stream are far larger than the others, and set the scale of a whole token. In a
Hadamard basis every channel is a mean of all of them with signs, so the largest value of a token shrinks to about that of
normally distributed ones. The outputs do not change, since Q Qᵀ = I:

- `where=cache`: queries and keys, (q Q)·(k Q) = q·k, after rotary embeddings and norms, before a key is written to the KV
  cache. QuaRot: Ashkboos et al. 2024, §4, stage 1b. https://arxiv.org/abs/2404.00456
- `where=heads`: values and the output projection, (z Q)(W_o Q)ᵀ = z W_oᵀ, folded into weights. QuaRot §4, stage 1c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Rewrite
from lissom.passes.quantize.rotate.bases import hadamard, random_basis
from lissom.passes.quantize.rotate.cache import rotate_keys
from lissom.passes.quantize.rotate.heads import rotate_values


@dataclass(frozen=True)
class Rotate(Rewrite):
    """Gives activations another orthogonal basis, in which they are quantized or pruned at less loss.

    Attributes:
        where: `cache`, queries and the keys of the KV cache; `heads`, values and the input of output projections.
        basis: `hadamard`, or a random orthogonal matrix where there is no Hadamard matrix of the size; `random`.
        seed: of random matrices.
    """

    where: Literal["cache", "heads"] = "cache"
    basis: Literal["hadamard", "random"] = "hadamard"
    seed: int = 0
    requires = (FLOATING_POINT_WEIGHTS,)

    def run(self, edit: Editor) -> None:
        if self.where == "cache":
            rotate_keys(edit, self._basis)
        else:
            rotate_values(edit, self._basis)

    def _basis(self, size: int) -> torch.Tensor:
        """The orthogonal matrix of a size, [size, size] in float64."""
        found = hadamard(size) if self.basis == "hadamard" else None
        return random_basis(size, self.seed) if found is None else found
