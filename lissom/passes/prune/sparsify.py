"""Unstructured, N:M and block pruning: zero weights of linear layers.

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
matrix that several layers share is pruned first, on the inputs of all of them in the program before this pass. Each expert of a
mixture is pruned on the tokens routed to it; experts that no token reaches stay as they are.

With the pattern N:M, at most N of every M neighbours in a row are kept. With the pattern `block` blocks of 4 neighbouring
inputs of 32 output features are ranked by the sum of the squares of what a criterion compares: within the layer by `magnitude`,
among the same 32 features by `wanda`, within a block of columns by `sparsegpt`. `pack-sparse` runs blocks in float32, bfloat16
and int8 on CPUs, and 2:4 in bfloat16 and float16 on CUDA; elsewhere zeros give no speedup, which the report notes. Artifacts
become smaller in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx

from lissom.compiler.analysis.amounts import UNCHANGED, Amounts, AmountSite, amounts_text, fraction_of
from lissom.compiler.analysis.module_filter import is_protected
from lissom.compiler.analysis.structure.linear import is_linear
from lissom.compiler.analysis.structure.matrix import (
    Matrix,
    matrices_of,
    matrix_of,
    readers_of,
    stack_like,
    treated_layers,
    weight_sites,
)
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.calibration.hessian import inverse_factor
from lissom.compiler.calibration.layer_sweep import has_tokens, sweep_moments
from lissom.compiler.calibration.statistics import Moments
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Approximation
from lissom.compiler.pipeline.spelling import format_pass
from lissom.errors import RequirementError, UnsupportedError
from lissom.ops.block_sparse_linear import BLOCK as INPUTS
from lissom.ops.epilogue import PANEL, in_panels


@dataclass(frozen=True)
class Blocks:
    """The fraction of blocks to keep."""

    keep: float


Density = float | tuple[int, int] | Blocks
"""The density of a matrix: the fraction to keep, N of every M neighbours in a row, or the fraction of blocks."""
BLOCK = "block"
"""The pattern of blocks."""
Prune = Callable[[torch.Tensor, Moments, str], torch.Tensor]
"""Gives the pruned matrix from a matrix, [features out, features in], the moments of its inputs, and its name."""
_KEEP = 0.5
NOTE = (
    "zeros in weights make nothing faster by themselves: every backend multiplies with them, but for eager, which skips "
    "blocks on CPUs (pattern=block), and 2:4 in bfloat16 and float16 on CUDA"
)
BLOCK_NOTE = "eager on a CPU skips blocks of zeros where that is measured faster; every other backend multiplies with them"


@dataclass(frozen=True)
class Sparsify(Approximation):
    """Zeroes the least important weights of linear layers, unstructured or N:M.

    Attributes:
        keep: fraction of each layer's weights to keep, above 0 and up to 1; of all layers together with scope=global. 0.5 where
            neither it nor pattern nor amounts is given.
        pattern: N:M, such as 2:4, in place of `keep`: at most N of every M neighbours in a row are kept. `block`: `keep` is the
            fraction of blocks of 4 inputs by 32 output features.
        amounts: fractions or patterns N:M of single layers by module path, with `*` and `?`; `none` leaves a layer dense:
            `"encoder.layer.0=0.3,*.query=2:4"`. Without keep and a pattern N:M, other layers stay dense.
        criterion: how weights are ranked; all but `magnitude` need calibration data.
        scope: ranks weights within each layer, or, by magnitude only, within the whole program.
        protect: module paths of layers to leave dense, with `*` and `?`, separated by commas: `"encoder.layer.0,*.11"`.
        lm_head: prunes LM heads and classifiers too, and with them the embedding tables tied to them.
        damping: added to the diagonal of XᵀX for `sparsegpt`, as a fraction of its mean.
        block_size: number of columns that `sparsegpt` ranks together.
    """

    keep: float | None = None
    pattern: str | None = None
    criterion: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude"
    scope: Literal["layer", "global"] = "layer"
    protect: str = ""
    lm_head: bool = False
    damping: float = 0.01
    block_size: int = 128
    amounts: str = ""
    requires = (FLOATING_POINT_WEIGHTS,)

    def __post_init__(self) -> None:
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UnsupportedError(f"sparsify keeps a fraction of the weights above 0 and up to 1, not keep={self.keep:g}")
        _parse(self.pattern)  # an unknown pattern is named first
        if self.pattern not in (None, BLOCK) and self.keep is not None:
            raise UnsupportedError("sparsify takes keep= or pattern=N:M, not both; with pattern=block keep= counts blocks")
        patterns = [self.pattern, *(amount for _, amount in self._amounts().entries if ":" in amount)]
        if self.damping <= 0 or self.block_size < 1:
            raise UnsupportedError("sparsify takes damping= above 0 and block_size= of 1 or more")
        groups = {pattern[1] for pattern in map(_parse, patterns) if pattern is not None}
        for group in sorted(groups | ({INPUTS} if self.pattern == BLOCK else set())):
            if self.criterion == "sparsegpt" and self.block_size % group:
                raise UnsupportedError(
                    f"sparsegpt takes block_size= in multiples of the {group} of its pattern, not {self.block_size}"
                )
        if self.scope == "global" and (self.criterion != "magnitude" or self.pattern is not None):
            raise UnsupportedError(
                "sparsify{scope=global} ranks by magnitude and takes no pattern; wanda and sparsegpt compare weights within a "
                "row and a block of columns, and a pattern within its M: leave out scope=, or choose criterion=magnitude"
            )

    @classmethod
    def sites(cls, program: Program) -> Sequence[AmountSite]:
        pass_ = cls(lm_head=True)
        candidates = {node: matrix for node, matrix in pass_._candidates(program).items() if _obstacle(matrix, set()) is None}
        heads = {candidates[node].name for node in program.fact(structure).lm_heads if node in candidates}
        return [
            replace(site, takes={format_pass(pass_): site.takes[cls.name()]}) if name in heads else site
            for name, site in weight_sites(candidates, cls.name(), _taken).items()
        ]

    def run(self, edit: Editor) -> None:
        if self.criterion != "magnitude" and not edit.data:
            raise RequirementError(
                f"sparsify{{criterion={self.criterion}}} needs calibration data: pass data=, or choose criterion=magnitude"
            )
        sites = weight_sites(self._candidates(edit.program), self.name(), _taken)
        given = dict(zip(sites, self._amounts().at([*sites.values()], "linear layers"), strict=True))
        layers = self._layers(edit, given)
        densities = {name: density for name, amount in given.items() if not isinstance(density := self._density(amount), str)}
        if self.criterion == "magnitude":
            self._rank_by_magnitude(edit, layers, densities, {name for name, amount in given.items() if amount is None})
        elif self.criterion == "wanda":
            _calibrate(edit, layers, lambda weight, read, name: wanda(weight, read, densities[name]))
        else:
            damping, size = self.damping, self.block_size
            _calibrate(edit, layers, lambda weight, read, name: sparsegpt(weight, read, densities[name], damping, size))
        self._tell(edit, sites, layers, densities)
        if edit.rewritten:
            edit.note(BLOCK_NOTE if self.pattern == BLOCK else NOTE)

    def _amounts(self) -> Amounts:
        takes = "a fraction such as 0.5, a pattern such as 2:4, or none"
        return Amounts.parse(
            self.amounts, "sparsify{amounts=}", lambda text: ":" in text or fraction_of(text) is not None, takes
        )

    def _density(self, amount: str | None) -> Density | str:
        """The density of a layer with this amount, or the reason it stays dense."""
        if amount is None and self.amounts and self.keep is None and self.pattern in (None, BLOCK):
            return "amounts= does not name it"
        if amount == UNCHANGED:
            return "amounts= leaves it dense"
        keep = (_KEEP if self.keep is None else self.keep) if amount is None else fraction_of(amount)
        pattern = _parse(self.pattern if amount is None else amount)
        if pattern is not None:
            return pattern
        return Blocks(keep or _KEEP) if self.pattern == BLOCK else keep or _KEEP

    def _candidates(self, program: Program) -> dict[fx.Node, Matrix]:
        """The linear layers with a matrix, but for those that are passed over."""
        layers = [node for node in program.nodes() if is_linear(node) and node not in self._passed_over(program)]
        return {node: matrix for node in layers if isinstance(matrix := matrix_of(node, stacks=True), Matrix)}

    def _passed_over(self, program: Program) -> set[fx.Node]:
        transformer = program.fact(structure)
        heads = () if self.lm_head else transformer.lm_heads
        return {*(site.router for site in transformer.mixtures), *heads, *transformer.convolutions}

    def _layers(self, edit: Editor, given: Mapping[str, str | None]) -> dict[fx.Node, Matrix]:
        """The layers to prune; the others are reported as skipped.

        Args:
            given: the amount of each weight.

        Raises:
            UnsupportedError: when a pattern does not fit a layer that `amounts` names.
        """
        embeddings = edit.program.fact(structure).embeddings if self.lm_head else ()
        tables = {embedding.node.all_input_nodes[0] for embedding in embeddings}

        def obstacle(node: fx.Node, matrix: Matrix) -> str | None:
            density = self._density(amount := given[matrix.name])
            if isinstance(density, str):
                return density
            misfit = _pattern_obstacle(matrix, density)
            if misfit is not None and amount is not None:
                raise UnsupportedError(
                    f"sparsify{{amounts=}}: '{nodes.origin(node).module_path}' cannot have {amount}: {misfit}"
                )
            return _obstacle(matrix, tables) or misfit

        return treated_layers(
            edit,
            lambda node: "it is protected" if is_protected(node, self.protect) else matrix_of(node, stacks=True),
            obstacle,
            self._passed_over(edit.program),
        )

    def _rank_by_magnitude(
        self, edit: Editor, layers: Mapping[fx.Node, Matrix], densities: Mapping[str, Density], ranked: set[str]
    ) -> None:
        """Zero the smallest weights.

        Args:
            ranked: the names of weights without an amount, which scope=global ranks together.
        """
        matrices = {matrix.name: matrix for matrix in layers.values()}
        together = {name: matrix.read(edit.program) for name, matrix in matrices.items() if name in ranked}
        chosen: dict[str, torch.Tensor] = {}
        if self.scope == "global" and together:
            sizes = torch.cat([weight.abs().flatten().float() for weight in together.values()])
            whole = most(sizes, _KEEP if self.keep is None else self.keep)
            chosen = dict(zip(together, whole.split([weight.numel() for weight in together.values()]), strict=True))
        for name, matrix in matrices.items():
            weight, density = matrix.read(edit.program), densities[name]
            if isinstance(density, tuple):
                kept = largest(weight.abs(), density)
            elif isinstance(density, Blocks):
                kept = spread_blocks(most(block_scores(weight.float().square()), density.keep), weight.shape)
            elif name in chosen:
                kept = chosen[name].view_as(weight)
            else:
                kept = most(weight.abs().float(), density)
            matrix.write(edit, weight.masked_fill(~kept, 0))

    def _tell(
        self, edit: Editor, sites: Mapping[str, AmountSite], layers: Mapping[fx.Node, Matrix], densities: Mapping[str, Density]
    ) -> None:
        """Record the pass with the density that was chosen for each layer."""
        matrices = {matrix.name: matrix for matrix in layers.values()}
        chosen: dict[str, object] = {}
        for name, matrix in matrices.items():
            density = densities[name]
            if self.scope == "global" and not isinstance(density, tuple):
                weight = matrix.read(edit.program)
                density = int(weight.count_nonzero()) / weight.numel()
            if isinstance(density, Blocks):
                density = density.keep
            chosen[name] = ":".join(map(str, density)) if isinstance(density, tuple) else density
        text = amounts_text([*sites.values()], [chosen.get(name) for name in sites])
        # A layer that lost all its weights has no fraction as text.
        if text and all(chosen.values()):
            pattern = self.pattern if self.pattern == BLOCK else None
            edit.per_site = format_pass(replace(self, keep=None, pattern=pattern, amounts=text, scope="layer", protect=""))


def _parse(pattern: str | None) -> tuple[int, int] | None:
    """N and M of `N:M`; None for `block` and for a fraction.

    Raises:
        UnsupportedError: for any other text.
    """
    if pattern is None or pattern == BLOCK or fraction_of(pattern) is not None:
        return None
    n, colon, m = pattern.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        raise UnsupportedError(f"pattern={pattern} is not known; write N:M with 0 < N < M, such as 2:4, or block")
    return int(n), int(m)


def _obstacle(matrix: Matrix, tables: set[fx.Node]) -> str | None:
    """The reason a layer's weights cannot be zeroed; None if they can."""
    if matrix.node not in tables and not all(is_linear(reader) for reader in readers_of(matrix.node)):
        return "its weight is also read by operators other than linear layers"
    return None


def _pattern_obstacle(matrix: Matrix, density: Density) -> str | None:
    """The reason a pattern N:M does not fit a layer; None if it fits."""
    size = matrix.shape[1]
    group = INPUTS if isinstance(density, Blocks) else density[1] if isinstance(density, tuple) else 1
    return f"its {size} input features are no multiple of {group}" if size % group else None


def _taken(outputs: int, inputs: int) -> tuple[str, ...]:
    return (UNCHANGED, "a fraction", *(() if inputs % 4 else ("2:4",)))


def _calibrate(edit: Editor, layers: dict[fx.Node, Matrix], prune: Prune) -> None:
    """Prune shared matrices first, on the inputs of all their layers, then the others in order, on the result so far."""
    names = {node: matrix.name for node, matrix in layers.items()}
    for finished, (node, read) in enumerate(sweep_moments(edit.program, edit.data, names)):
        edit.report("layers", finished, len(set(names.values())))
        edit.current = node
        weight = layers[node].read(edit.program)
        if not has_tokens(edit, node, read):
            continue
        pruned = [
            prune(part, moments, names[node]).to(part.dtype) if moments.count else part
            for part, moments in zip(matrices_of(weight), read.each, strict=True)
        ]
        layers[node].write(edit, stack_like(pruned, weight))


def most(scores: torch.Tensor, keep: float) -> torch.Tensor:
    """True for the fraction `keep` of the scores that is largest, one at least; of equal ones the first."""
    flat, count = scores.flatten(), max(1, round(keep * scores.numel()))
    least = flat.kthvalue(flat.numel() - count + 1).values
    kept = flat > least
    kept[(flat == least).nonzero().flatten()[: count - int(kept.sum())]] = True
    return kept.view_as(scores)


def largest(scores: torch.Tensor, pattern: tuple[int, int]) -> torch.Tensor:
    """True for the N largest of every M neighbours along a row.

    Args:
        scores: [rows, columns].
    """
    n, m = pattern
    groups = scores.unflatten(-1, (-1, m))
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(n, -1).indices, True).flatten(-2)


def block_scores(scores: torch.Tensor) -> torch.Tensor:
    """The sum of the scores of each block, [features / 32 rounded up, inputs / 4].

    Args:
        scores: [features, inputs].
    """
    return in_panels(scores, INPUTS).sum((1, 3))


def spread_blocks(kept: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """What is true for blocks, for each element of a matrix of that shape."""
    return kept.repeat_interleave(PANEL, 0)[: shape[0]].repeat_interleave(INPUTS, 1)


def wanda(weight: torch.Tensor, read: Moments, density: Density) -> torch.Tensor:
    """The matrix with zeros where |W_ij| · ‖X_j‖₂ is least in each row, in each M neighbours of it, or in blocks of a panel."""
    scores = weight.abs().float() * read.norms
    if isinstance(density, Blocks):
        blocks = block_scores(scores.square())
        kept = largest(blocks, (max(1, round(density.keep * blocks.shape[1])), blocks.shape[1]))
        return weight.masked_fill(~spread_blocks(kept, weight.shape), 0)
    columns = weight.shape[1]
    pattern = density if isinstance(density, tuple) else (max(1, round(density * columns)), columns)
    return weight.masked_fill(~largest(scores, pattern), 0)


def sparsegpt(weight: torch.Tensor, read: Moments, density: Density, damping: float, block_size: int) -> torch.Tensor:
    """The matrix with zeros, and the remaining weights updated to compensate; see the module docstring."""
    pattern = density if isinstance(density, tuple) else None
    pruned = weight.float().clone()
    dead = read.gram.diagonal() == 0
    pruned[:, dead] = 0
    factor = inverse_factor(read.gram, damping)
    for start in range(0, pruned.shape[1], block_size):
        block, upper = pruned[:, start : start + block_size], factor[start : start + block_size, start : start + block_size]
        # Zeros are written, not multiplied: a negative zero has its sign bit set, so compression would not see a zero.
        scores = block.square() / upper.diagonal().square()
        if isinstance(density, Blocks):
            kept = spread_blocks(most(block_scores(scores), density.keep), block.shape)
        else:
            kept = most(scores, density if isinstance(density, float) else 1.0)
        errors = torch.zeros_like(block)
        for index in range(block.shape[1]):
            if pattern and index % pattern[1] == 0:
                group = slice(index, index + pattern[1])
                kept[:, group] = largest(block[:, group].square() / upper.diagonal()[group].square(), pattern)
            errors[:, index] = block[:, index] * ~kept[:, index] / upper[index, index]
            block[:, index + 1 :] -= errors[:, index, None] * upper[index, index + 1 :]
            block[~kept[:, index], index] = 0
        pruned[:, start + block_size :] -= errors @ factor[start : start + block_size, start + block_size :]
    return pruned
