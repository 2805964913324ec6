"""Rotate activations: give channels another orthogonal basis, in which they are quantized or pruned at less loss.

A few channels of keys, values and the residual stream are far larger than the others, and set the scale of a whole token. In a
Hadamard basis every channel is a mean of all of them with signs, so the largest value of a token shrinks to about that of
normally distributed ones. The outputs do not change, since Q Qᵀ = I:

- `where=cache`: queries and keys, (q Q)·(k Q) = q·k, after rotary embeddings and norms, before a key is written to the KV
  cache. QuaRot: Ashkboos et al. 2024, §4, stage 1d. https://arxiv.org/abs/2404.00456 Where nothing but views lies between
  the projections and the scores, Q is folded into their weights; elsewhere it is a product for each new token and head.
- `where=heads`: values and the output projection, (z Q)(W_o Q)ᵀ = z W_oᵀ, folded into weights: values are rotated in the KV
  cache, and so is the input of the output projection. QuaRot §4, stage 1c.
- `where=residual`: the residual stream with all that writes and reads it, folded into weights. RMS scales and biases are folded
  first, and what writes to a stream with LayerNorms is centred. SliceGPT: Ashkboos et al. 2024, §3.
  https://arxiv.org/abs/2401.15024 One basis serves the whole stream, so that shortcuts need no matrices. LayerNorms whose
  output is also the shortcut, as in BERT, are refused: their scale and mean act on the stream itself.

With calibration data, `where=cache` balances keys against queries, which QuaRot does not: keys are stored as (k - μ) A and
queries are multiplied by A⁻ᵀ. μ is the mean key, and adds the same to all scores of a query; A makes the error of the scores
after quantization least, and ends in a Hadamard matrix. See `bases.balanced`. With `quantize-cache{bits=4}` the perplexity of
Gemma 3 270M grows by 9.1 ± 0.4 % on 12,345 tokens, after `rotate` with a Hadamard basis by 8.7 ± 0.5 %, and after `rotate` on
4,096 tokens of calibration data by 0.5 ± 0.2 %, as much as with int8.

`rotate{where=residual,basis=pca},prune-hidden{keep=0.75}` is SliceGPT with one basis for all layers: the last components of
the stream are pruned. Gemma 3 270M loses 0.47 ± 0.02 nats a token, and 1.05 ± 0.03 without the rotation, on 4,615 tokens after
8,192 of calibration; the outputs of ViT-S/16 with random weights have a cosine of 0.990, and of 0.979 without. A tied embedding
table keeps its width, so the program is larger than without the rotation: measure both. Models with post-norm blocks, such as
MiniLM, are refused.

There is no `where=down`. A Hadamard matrix on the input of down projections cannot be folded through the activation, and as a
product it takes three to six times as long as the projection.

In bfloat16 and float16, folded weights are rounded once more, and so are rotated queries and keys: outputs change by a rounding
error of the dtype, and a rotation that changes them by more is undone. Rotate a float32 model, then `cast`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Rewrite
from lissom.errors import UnsupportedError
from lissom.passes.quantize.rotate.bases import hadamard, random_basis
from lissom.passes.quantize.rotate.cache import rotate_keys
from lissom.passes.quantize.rotate.heads import rotate_values
from lissom.passes.quantize.rotate.residual import rotate_residual


@dataclass(frozen=True)
class Rotate(Rewrite):
    """Gives activations another orthogonal basis, in which they are quantized or pruned at less loss.

    Attributes:
        where: `cache`, queries and the keys of the KV cache; `heads`, values and the input of output projections; `residual`,
            the residual stream, where its norms allow it.
        basis: `hadamard`, a Hadamard matrix, or a random orthogonal matrix where there is none of the size; `random`;
            `balanced`, for the cache, also balances queries and keys and subtracts the mean key, on calibration data; `pca`,
            for the residual stream, its principal components on calibration data. `auto` is `balanced` for the cache where
            there is calibration data, else `hadamard`.
        seed: of random matrices.
    """

    where: Literal["cache", "heads", "residual"] = "cache"
    basis: Literal["auto", "hadamard", "random", "balanced", "pca"] = "auto"
    seed: int = 0
    requires = (FLOATING_POINT_WEIGHTS,)

    def run(self, edit: Editor) -> None:
        if self.basis == "balanced" and self.where != "cache":
            raise UnsupportedError(f"rotate{{where={self.where}}} takes no basis=balanced, which is for where=cache")
        if self.basis == "pca" and self.where != "residual":
            raise UnsupportedError(f"rotate{{where={self.where}}} takes no basis=pca, which is for where=residual")
        if self.where == "cache":
            is_balanced = self.basis == "balanced" or (self.basis == "auto" and bool(edit.data))
            rotate_keys(edit, self._basis, is_balanced=is_balanced)
        elif self.where == "heads":
            rotate_values(edit, self._basis)
        else:
            rotate_residual(edit, None if self.basis == "pca" else self._basis)

    def _basis(self, size: int) -> torch.Tensor:
        """The orthogonal matrix of a size, [size, size] in float64."""
        found = None if self.basis == "random" else hadamard(size)
        return random_basis(size, self.seed) if found is None else found
