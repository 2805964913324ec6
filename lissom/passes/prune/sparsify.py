"""Unstructured and N:M pruning: zero single weights of linear layers.

Layers keep their shape; their matrices W: [features out, features in] get zeros. All linear layers are pruned except LM
heads and the routers of mixtures of experts. Three criteria rank the weights. X: [tokens, features in] are a layer's inputs on
calibration data, without padding.

- `magnitude`: |W_ij|, compared within the layer, or within all layers when `scope` is `global`. Needs no data.
- `wanda`: |W_ij| · ‖X_j‖₂, compared within each row i. Sun et al. 2023, A Simple and Effective Pruning Approach for Large
  Language Models, equation 1. https://arxiv.org/abs/2306.11695
- `sparsegpt`: remaining weights are updated to compensate removed ones. With H = XᵀX + λI and U the upper Cholesky factor
  of H⁻¹, columns are processed from first to last. In each block of columns the weights with the least W_ij² / U_jj² are
  removed, compared within the block, or within every M neighbours of a row. The error of each is passed on to later columns:
  W_i,j: −= (W_ij / U_jj) · U_j,j:, at once within the block, and to the columns after the block when it is finished. λ is
  `damping` times the mean of the diagonal of XᵀX. A feature that is always zero keeps no weight. Frantar & Alistarh 2023,
  SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, algorithm 1. https://arxiv.org/abs/2301.00774

`wanda` and `sparsegpt` prune the layers in the order in which they run, each on the outputs of the pruned layers before it. A
matrix that several layers share is pruned first, on the inputs of all of them in the program before this pass.

With the pattern N:M, at most N of every M neighbours in a row are kept. CUDA runs 2:4 in bfloat16 and float16 (`pack-sparse`);
elsewhere zeros give no speedup, which the report notes. Artifacts become smaller in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import fx

from lissom.compiler.analysis.module_filter import is_protected
from lissom.compiler.analysis.structure.linear import is_linear
from lissom.compiler.analysis.structure.matrix import Matrix, matrix_of, readers_of, treated_layers
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.calibration.hessian import inverse_factor
from lissom.compiler.calibration.layer_sweep import sweep_moments
from lissom.compiler.calibration.statistics import Moments
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Approximation
from lissom.errors import RequirementError, UnsupportedError

Prune = Callable[[torch.Tensor, Moments], torch.Tensor]
"""Gives the pruned matrix from a matrix, [features out, features in], and the moments of its inputs."""
NOTE = (
    "zeros in weights make nothing faster by themselves: every backend multiplies with them, but for eager on CUDA, "
    "which runs the pattern 2:4 in bfloat16 and float16 as such"
)


@dataclass(frozen=True)
class Sparsify(Approximation):
    """Zeroes the least important weights of linear layers, unstructured or N:M.

    keep: fraction of each layer's weights to keep, above 0 and up to 1; of all layers together with scope=global.
    pattern: N:M, such as 2:4, in place of `keep`: at most N of every M neighbours in a row are kept.
    criterion: how weights are ranked; all but `magnitude` need calibration data.
    scope: ranks weights within each layer, or, by magnitude only, within the whole program.
    protect: module paths of layers to leave dense, with `*` and `?`, separated by commas: `"encoder.layer.0,*.11"`.
    lm_head: prunes LM heads and classifiers too, and with them the embedding tables tied to them.
    damping: added to the diagonal of XᵀX for `sparsegpt`, as a fraction of its mean.
    block_size: number of columns that `sparsegpt` ranks together.
    """

    keep: float = 0.5
    pattern: str | None = None
    criterion: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude"
    scope: Literal["layer", "global"] = "layer"
    protect: str = ""
    lm_head: bool = False
    damping: float = 0.01
    block_size: int = 128
    requires = (FLOATING_POINT_WEIGHTS,)

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UnsupportedError(f"sparsify keeps a fraction of the weights above 0 and up to 1, not keep={self.keep:g}")
        if self.pattern is not None and self.keep != Sparsify.keep:
            raise UnsupportedError("sparsify takes keep= or pattern=, not both")
        form = _parse(self.pattern)
        if self.damping <= 0 or self.block_size < 1:
            raise UnsupportedError("sparsify takes damping= above 0 and block_size= of 1 or more")
        if self.criterion == "sparsegpt" and form is not None and self.block_size % form[1]:
            raise UnsupportedError(
                f"sparsegpt takes block_size= in multiples of the {form[1]} of its pattern, not {self.block_size}"
            )
        if self.scope == "global" and (self.criterion != "magnitude" or self.pattern is not None):
            raise UnsupportedError(
                "sparsify{scope=global} ranks by magnitude and takes no pattern; wanda and sparsegpt compare weights within a "
                "row and a block of columns, and a pattern within its M: leave out scope=, or choose criterion=magnitude"
            )

    def run(self, edit: Editor) -> None:
        layers = _layers(edit, self.lm_head, self.protect, _parse(self.pattern))
        if self.criterion == "magnitude":
            self._rank_by_magnitude(edit, layers)
        elif not edit.data:
            raise RequirementError(
                f"sparsify{{criterion={self.criterion}}} needs calibration data: pass data=, or choose criterion=magnitude"
            )
        else:
            form = _parse(self.pattern)
            prune = partial(sparsegpt, keep=self.keep, pattern=form, damping=self.damping, block_size=self.block_size)
            _calibrate(edit, layers, partial(wanda, keep=self.keep, pattern=form) if self.criterion == "wanda" else prune)
        if edit.rewritten:
            edit.note(NOTE)

    def _rank_by_magnitude(self, edit: Editor, layers: dict[fx.Node, Matrix]) -> None:
        matrices = {matrix.name: matrix for matrix in layers.values()}
        least = 0.0
        if self.scope == "global" and matrices:
            least = threshold([matrix.read(edit.program) for matrix in matrices.values()], self.keep)
        for matrix in matrices.values():
            weight = matrix.read(edit.program)
            form = _parse(self.pattern)
            if form is not None:
                kept = largest(weight.abs(), form)
            else:
                kept = weight.abs() > (least if self.scope == "global" else threshold([weight], self.keep))
            matrix.write(edit, weight.masked_fill(~kept, 0))


def _parse(pattern: str | None) -> tuple[int, int] | None:
    """N and M of `N:M`.

    Raises: UnsupportedError for any other text.
    """
    if pattern is None:
        return None
    n, colon, m = pattern.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise UnsupportedError(f"pattern={pattern} is not known; write N:M with 0 < N < M, such as 2:4")
    return int(n), int(m)


def _layers(edit: Editor, lm_head: bool, protect: str, pattern: tuple[int, int] | None) -> dict[fx.Node, Matrix]:
    """The layers to prune; the others are reported as skipped."""
    found = edit.program.fact(structure)
    heads = () if lm_head else found.lm_heads
    passed_over = {*(site.router for site in found.mixtures), *heads, *found.convolutions}
    tables = {item.node.all_input_nodes[0] for item in found.embeddings} if lm_head else set[fx.Node]()
    return treated_layers(
        edit,
        lambda node: "it is protected" if is_protected(node, protect) else matrix_of(node),
        lambda node, matrix: _obstacle(matrix, tables, pattern),
        passed_over,
    )


def _obstacle(matrix: Matrix, tables: set[fx.Node], pattern: tuple[int, int] | None) -> str | None:
    """Why a layer's weights cannot be zeroed; None when they can."""
    if matrix.node not in tables and not all(is_linear(reader) for reader in readers_of(matrix.node)):
        return "its weight is also read by operators other than linear layers"
    size = nodes.tensor_type(matrix.node).shape[0 if matrix.transposed else 1]
    if pattern is not None and int(size) % pattern[1]:  # pyright: ignore[reportArgumentType]
        return f"its {size} input features are no multiple of {pattern[1]}"
    return None


def _calibrate(edit: Editor, layers: dict[fx.Node, Matrix], prune: Prune) -> None:
    """Prune shared matrices first, on the inputs of all their layers, then the others in order, on the result so far."""
    names = {node: matrix.name for node, matrix in layers.items()}
    for finished, (node, read) in enumerate(sweep_moments(edit.program, edit.data, names)):
        edit.report("layers", finished, len(set(names.values())))
        edit.current = node
        layers[node].write(edit, prune(layers[node].read(edit.program), read.moments))


def threshold(weights: Sequence[torch.Tensor], keep: float) -> float:
    """The magnitude that the fraction `keep` of all these weights exceeds."""
    sizes = torch.cat([weight.abs().flatten().float() for weight in weights])
    gone = sizes.numel() - max(1, round(keep * sizes.numel()))
    return float(sizes.kthvalue(gone).values) if gone else -1.0


def largest(scores: torch.Tensor, pattern: tuple[int, int]) -> torch.Tensor:
    """True for the N largest of every M neighbours along a row. scores: [rows, columns]."""
    n, m = pattern
    groups = scores.unflatten(1, (-1, m))
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(n, -1).indices, True).flatten(1)


def wanda(weight: torch.Tensor, read: Moments, keep: float, pattern: tuple[int, int] | None) -> torch.Tensor:
    """The matrix with zeros where |W_ij| · ‖X_j‖₂ is least in each row, or in each M neighbours of it."""
    scores = weight.abs().float() * read.norms
    columns = weight.shape[1]
    return weight.masked_fill(~largest(scores, pattern or (max(1, round(keep * columns)), columns)), 0)


def sparsegpt(
    weight: torch.Tensor, read: Moments, keep: float, pattern: tuple[int, int] | None, damping: float, block_size: int
) -> torch.Tensor:
    """The matrix with zeros, and the remaining weights updated to compensate; see the module docstring."""
    result = weight.float().clone()
    dead = read.gram.diagonal() == 0
    result[:, dead] = 0
    factor = inverse_factor(read.gram, damping)
    for start in range(0, result.shape[1], block_size):
        block, upper = result[:, start : start + block_size], factor[start : start + block_size, start : start + block_size]
        # Zeros are written, not multiplied: a negative zero has its sign bit set, so compression would not see a zero.
        scores = block.square() / upper.diagonal().square()
        kept = scores > threshold([scores], keep)
        errors = torch.zeros_like(block)
        for index in range(block.shape[1]):
            if pattern and index % pattern[1] == 0:
                group = slice(index, index + pattern[1])
                kept[:, group] = largest(block[:, group].square() / upper.diagonal()[group].square(), pattern)
            errors[:, index] = block[:, index] * ~kept[:, index] / upper[index, index]
            block[:, index + 1 :] -= errors[:, index, None] * upper[index, index + 1 :]
            block[~kept[:, index], index] = 0
        result[:, start + block_size :] -= errors @ factor[start : start + block_size, start + block_size :]
    return result
