"""GPTQ: quantize weights column by column, and let the later columns compensate the error of each.

W: [features out, features in]; X: [tokens, features in], a layer's inputs on calibration data, without padding. With
H = XᵀX + λI and U the upper Cholesky factor of H⁻¹, columns are quantized one by one, and the error of each is passed on:

    e = (W_:j - Q(W_:j)) / U_jj,   W_:k −= e · U_jk  for k > j

which keeps ‖XWᵀ - XQᵀ‖ small. λ is `damping` times the mean of the diagonal of XᵀX; a feature that is always zero is rounded
to nearest. Frantar et al. 2022, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
algorithm 1. https://arxiv.org/abs/2210.17323

The pass comes after `quantize` and keeps its Q/DQ nodes and formats; after it Q(W) = W bit for bit. `act_order` quantizes
columns by decreasing diagonal of H: the most important first, while many others can compensate. Scales are fixed before, so
groups stay contiguous in memory. `rescale` recomputes the scale of a group when its columns are reached, from the updated
weights; it requires columns in their original order.

Three things go beyond the algorithm:

- `asymmetric`. Layers are quantized in the order in which they run. X is a layer's input with the layers before it quantized,
  X₀ its input in the original program, and X₀Wᵀ the target. W above is replaced by

      V = W (I + (X₀ - X)ᵀX (XᵀX + λ'I)⁻¹),   for which ‖XVᵀ - X₀Wᵀ‖² + λ'‖V - W‖² is least

  with λ' `pull` times the mean of the diagonal of XᵀX, which keeps V from overfitting the calibration tokens. The aim is that
  of Li et al. 2025, GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration,
  https://arxiv.org/abs/2504.02692, whose algorithm changes only the columns after each column, and has no λ'.
- Where a norm is the only reader of a layer, each token is weighted by one over the square of the norm's divisor: errors are
  measured after the norm.
- `refit`. With q known, the scales s of a row's groups minimize tr((s·q - V) H (s·q - V)ᵀ). Scales of block formats, which
  have eight bits, stay as they are.

Where activations are quantized too, X is the quantized input. A matrix that several layers share, or that is an embedding
table as well, is quantized first, on the inputs of all its layers in the program before this pass, with W itself as target.
For an embedding table λ is larger, `table_damping`: its rows are read by themselves too, where each error counts for itself and
is not compensated by others, as λ‖W - Q(W)‖² has it.

Each expert of a mixture is quantized on the tokens routed to it, with W itself as target; the weights of experts that no token
reaches are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import fx

from lissom.compiler.analysis.module_filter import obstacle_by_name
from lissom.compiler.analysis.structure.linear import input_of
from lissom.compiler.analysis.structure.matrix import RoundedMatrix, matrices_of, rounded_matrix_of, stack_like, treated_layers
from lissom.compiler.calibration.hessian import Factors, damped, inverse_factor, shifted
from lissom.compiler.calibration.layer_sweep import Counterpart, Read, has_tokens, sweep_moments
from lissom.compiler.calibration.observers import weight_scale
from lissom.compiler.calibration.statistics import Moments
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.interpreter import call, evaluate_nodes
from lissom.compiler.ir.operators import LAYER_NORMS
from lissom.compiler.ir.printer import place
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.errors import RequirementError, UnsupportedError
from lissom.ops import formats
from lissom.ops.formats import FORMATS, Format

aten = torch.ops.aten

Rescale = Literal["none", "min-max", "mse"]
_Rounded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
_HELD = 1 << 22
"""Most elements in memory at once while scales are fitted."""
_LEAST = 1e-12
"""The least square of a norm's divisor."""


@dataclass(frozen=True)
class Gptq(Approximation):
    """Chooses quantized weights that minimize each layer's output error on calibration data.

    Attributes:
        act_order: quantizes columns by decreasing activation size, rather than from first to last.
        rescale: recomputes the scale of a group when it is reached, with this observer.
        asymmetric: fits layers to the outputs of the original model, rather than to those behind quantized layers.
        pull: regularization towards the original weights with asymmetric=true, as a fraction of the mean of the diagonal of
            XᵀX.
        refit: refits scales once the integers are chosen; those of block formats stay.
        tables: quantizes LM heads tied to an embedding table, and the table with them; by default those of four bits, since in
            int8 rounding to the nearest loses next to nothing, and a table has many rows.
        damping: added to the diagonal of XᵀX, as a fraction of its mean.
        table_damping: the same for embedding tables.
        block_size: number of columns after which errors are passed on to all later ones; affects only the time.
        skip: module paths to leave as they are, with `*` and `?`, separated by commas: `"encoder.layer.0,*.11"`.
        only: module paths to change, in the same form; others stay as they are.
        if_data: leaves weights rounded to nearest where there is no calibration data, and says so, rather than raise.
    """

    act_order: bool = True
    rescale: Rescale = "none"
    asymmetric: bool = True
    pull: float = 0.1
    refit: bool = True
    tables: bool | None = None
    damping: float = 0.01
    table_damping: float = 0.5
    block_size: int = 128
    skip: str = ""
    only: str = ""
    if_data: bool = False
    cheapens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.damping, self.table_damping, self.pull) <= 0 or self.block_size < 1:
            raise UnsupportedError("gptq takes damping=, table_damping= and pull= above 0 and block_size= of 1 or more")
        if self.rescale != "none" and self.act_order:
            raise UnsupportedError(
                "gptq{rescale=...} chooses the scale of a group when its columns are reached together: add act_order=false"
            )

    def run(self, edit: Editor) -> None:
        if not edit.data and self.if_data:
            edit.note("weights are rounded to nearest; with data= they are chosen by GPTQ, and lose less")
            return
        if not edit.data:
            raise RequirementError("gptq needs calibration data: pass data=, or leave gptq out to round to nearest")
        layers = self._layers(edit)
        names = {node: matrix.name for node, matrix in layers.items()}
        tables = [matrix.name for matrix in layers.values() if _is_table(matrix)]
        reference = edit.reference if self.asymmetric else None
        reads = sweep_moments(
            edit.program,
            edit.data,
            names,
            tables,
            token_weights=partial(_norm_weights, edit.program),
            counterpart=None if reference is None else Counterpart.of(edit.program, layers, reference),
        )
        factors = Factors()
        for finished, (node, read) in enumerate(reads):
            edit.report("layers", finished, len(set(names.values())))
            edit.current = node
            if has_tokens(edit, node, read):
                self._quantize(edit, layers[node], read, factors)

    def _layers(self, edit: Editor) -> dict[fx.Node, RoundedMatrix]:
        """The linear layers to quantize, with their matrices; the others are reported as skipped."""

        def obstacle(node: fx.Node, matrix: RoundedMatrix) -> str | None:
            by_name = obstacle_by_name(node, skip=self.skip, only=self.only)
            if by_name or not _is_table(matrix):
                return by_name
            included = _format_of(matrix).bits == 4 if self.tables is None else self.tables
            return None if included else "its weight is an embedding table too; tables=true treats both"

        layers = treated_layers(edit, partial(rounded_matrix_of, stacks=True), obstacle)
        fixed = next((node for node, matrix in layers.items() if matrix.has_block_format), None)
        if fixed is not None and self.rescale != "none":
            raise UnsupportedError(
                f"gptq{{rescale={self.rescale}}} chooses scales in floating point, and {place(edit.program, fixed)} has a "
                "weight in a block format, whose scales have eight bits: leave out rescale="
            )
        return layers

    def _quantize(self, edit: Editor, matrix: RoundedMatrix, read: Read, factors: Factors) -> None:
        weight, (scale, zero_point) = matrix.read(edit.program), matrix.read_scale(edit.program)
        points = [None] * len(read.each) if zero_point is None else matrices_of(zero_point)
        solved: list[_Rounded] = []
        for part, size, point, moments in zip(matrices_of(weight), matrices_of(scale), points, read.each, strict=True):
            # An expert without tokens keeps its weights, which are rounded to nearest.
            solved.append(
                self._rounded(matrix, part, size, point, moments, read.shift, factors) if moments.count else (part, size, point)
            )
        rounded, scale = (stack_like(parts, weight) for parts in ([part[0] for part in solved], [part[1] for part in solved]))
        zero_points = [part[2] for part in solved if part[2] is not None]
        zero_point = stack_like(zero_points, weight) if zero_points else None
        for part, value in zip(matrix.quantizer.all_input_nodes[1:], (scale, zero_point), strict=False):
            if value is not None and not matrix.has_block_format:
                edit.set_weight(part, (value.mT if matrix.transposed else value).contiguous())
        matrix.write(edit, rounded)

    def _rounded(
        self,
        matrix: RoundedMatrix,
        weight: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        moments: Moments,
        shift: torch.Tensor | None,
        factors: Factors,
    ) -> _Rounded:
        """A matrix after GPTQ, with its scales and zero points."""
        form, gram = _format_of(matrix), moments.gram
        damping = self.table_damping if _is_table(matrix) else self.damping
        if shift is not None:
            weight = shifted(weight, gram, shift, self.pull, factors)
        if self.rescale == "none":
            rounded = gptq(weight, gram, scale, zero_point, form, damping, self.block_size, self.act_order, factors)
        else:
            rounded, scale, zero_point = gptq_with_scales(weight, gram, scale, zero_point, form, damping, self.rescale, factors)
        if self.refit and not matrix.has_block_format:
            q = formats.quantize(rounded, scale, zero_point, form)
            levels = formats.dequantize(q, torch.ones_like(scale), zero_point, torch.float32)
            scale = fitted_scale(weight, levels, damped(gram, damping), scale)
            rounded = formats.dequantize(q, scale, zero_point, torch.float32)
        return rounded, scale, zero_point


def _format_of(matrix: RoundedMatrix) -> Format:
    return FORMATS[str(matrix.quantizer.kwargs["format"])]


def _is_table(matrix: RoundedMatrix) -> bool:
    return any(user.target is aten.embedding.default for user in matrix.quantizer.users)


def _norm_weights(program: Program, layer: fx.Node, read: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """One over the square of the divisor of the norm after a layer, [tokens] per sample; None without such a norm."""
    norm = next(iter(layer.users), None)
    others = [used for used in layer.all_input_nodes if used is not input_of(layer)]
    if len(layer.users) != 1 or norm is None or norm.target not in LAYER_NORMS or not all(map(_is_constant, others)):
        return None
    values = {used: evaluate_nodes(program.graph_module, used) for used in others}
    weights: list[torch.Tensor] = []
    for rows in read:
        given = call(layer, {**values, input_of(layer): rows}.__getitem__)
        assert isinstance(given, torch.Tensor)
        given = given.float()
        if norm.target is aten.layer_norm.default:
            given = given - given.mean(-1, keepdim=True)
        weights.append(1 / given.square().mean(-1).clamp_min(_LEAST))
    return weights


def _is_constant(node: fx.Node) -> bool:
    """True for weights and values computed from weights only."""
    return node.op == "get_attr" or (node.op == "call_function" and all(map(_is_constant, node.all_input_nodes)))


def gptq(
    weight: torch.Tensor,
    gram: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    form: Format,
    damping: float,
    block_size: int,
    act_order: bool,
    factors: Factors | None = None,
) -> torch.Tensor:
    """The matrix after quantize and dequantize by GPTQ, see the module docstring.

    Args:
        weight: [features out, features in].
        gram: XᵀX.
        scale: [blocks of rows, blocks of columns].
        zero_point: [blocks of rows, blocks of columns].
    """
    order = _order(gram, act_order)
    factor = (factors or Factors()).of(_factor_in_order, gram, damping, act_order)
    # Transposed, so that each column of the matrix is contiguous in memory.
    columns = weight.float().T[order]
    groups = (order * scale.shape[1] // len(gram)).tolist()
    for start in range(0, len(columns), block_size):
        _quantize_block(columns, factor, range(start, min(start + block_size, len(columns))), scale, zero_point, groups, form)
    quantized = torch.empty_like(columns)
    quantized[order] = columns
    return quantized.T


def _order(gram: torch.Tensor, act_order: bool) -> torch.Tensor:
    """The columns in the order in which they are quantized."""
    return gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(gram), device=gram.device)


def _factor_in_order(gram: torch.Tensor, damping: float, act_order: bool) -> torch.Tensor:
    """`inverse_factor` of the columns in that order."""
    order = _order(gram, act_order)
    return inverse_factor(gram[order][:, order], damping)


def gptq_with_scales(
    weight: torch.Tensor,
    gram: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    form: Format,
    damping: float,
    observer: Literal["min-max", "mse"],
    factors: Factors | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The quantized and dequantized matrix, with the scales and zero points chosen when a group's columns are reached."""
    factor = (factors or Factors()).of(inverse_factor, gram, damping)
    columns = weight.float().T.clone(memory_format=torch.contiguous_format)
    scale, zero_point = scale.clone(), None if zero_point is None else zero_point.clone()
    size = len(columns) // scale.shape[1]
    groups = [column // size for column in range(len(columns))]
    for group, start in enumerate(range(0, len(columns), size)):
        chosen, shifted = weight_scale(columns[start : start + size].T, (len(scale), 1), form, observer)
        scale[:, group] = chosen[:, 0].to(scale.dtype)
        if zero_point is not None and shifted is not None:
            zero_point[:, group] = shifted[:, 0].to(zero_point.dtype)
        _quantize_block(columns, factor, range(start, start + size), scale, zero_point, groups, form)
    return columns.T, scale, zero_point


def fitted_scale(weight: torch.Tensor, levels: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The scales that minimize the layer's error with fixed integers: min over s of tr((s·q - W) H (s·q - W)ᵀ).

    Args:
        weight: [features out, features in].
        levels: q minus its zero point, in that shape.
        hessian: H, positive definite.
        scale: [blocks of rows, blocks of columns], kept for a block of rows where the sign of a scale would change.
    """
    blocks, groups = scale.shape
    rows, size = len(weight) // blocks, weight.shape[1] // groups
    hessian, fitted = hessian.float(), scale.clone()
    step = max(1, _HELD // (rows * weight.shape[1]))
    for start in range(0, blocks, step):
        held, before = slice(start * rows, (start + step) * rows), scale[start : start + step]
        q, wanted = levels[held].float(), weight[held].float() @ hessian
        target = (q * wanted).reshape(-1, rows, groups, size).sum((1, 3))
        system = torch.empty(len(before), groups, groups, device=weight.device)
        for group, first in enumerate(range(0, len(hessian), size)):
            # The system is symmetric: a group is paired with itself and those after it.
            spread = q[:, first : first + size] @ hessian[first : first + size, first:]
            pairs = (spread * q[:, first:]).reshape(-1, rows, groups - group, size).sum((1, 3))
            system[:, group, group:] = system[:, group:, group] = pairs
        # A group of zeros is the same with any scale.
        empty = system.diagonal(dim1=1, dim2=2) == 0
        system.diagonal(dim1=1, dim2=2)[empty] = 1
        solution = torch.linalg.solve(system.double(), target.double()).to(scale.dtype)
        solution = torch.where(empty, before, solution)
        good = (solution.sign() == before.sign()).all(1, keepdim=True) & solution.isfinite().all(1, keepdim=True)
        fitted[start : start + step] = torch.where(good, solution, before)
    return fitted


def _quantize_block(
    columns: torch.Tensor,
    factor: torch.Tensor,
    block: range,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    groups: Sequence[int],
    form: Format,
) -> None:
    """Quantize and dequantize the columns of a block in place, with the scales of their groups, and correct all later ones.

    Args:
        columns: the matrix, [features in, features out].
        factor: U.
    """
    errors = torch.empty_like(columns[block.start : block.stop])

    def quantize(start: int, stop: int) -> None:
        """Some columns of the block; those between them and the end of the block stay as they are."""
        if stop - start > 1:
            # Halves, so that errors are passed on by products of matrices.
            middle = (start + stop) // 2
            quantize(start, middle)
            passed = errors[start - block.start : middle - block.start]
            columns[middle:stop].addmm_(factor[start:middle, middle:stop].T, passed, alpha=-1)
            quantize(middle, stop)
            return
        held = scale[:, groups[start], None], None if zero_point is None else zero_point[:, groups[start], None]
        wanted = columns[start].clone()
        q = formats.quantize(wanted[:, None], *held, form)
        columns[start] = formats.dequantize(q, *held, torch.float32)[:, 0]
        torch.sub(wanted, columns[start], out=errors[start - block.start]).div_(factor[start, start])

    quantize(block.start, block.stop)
    columns[block.stop :].addmm_(factor[block.start : block.stop, block.stop :].T, errors, alpha=-1)
