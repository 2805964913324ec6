"""Move weights onto the grid they are rounded to so that what rounding one column loses, the columns behind it make up for.

W: [features out, features in]; X: [tokens, features in], what a layer reads of the calibration data, padding left out. With
H = XᵀX + λI and U the upper Cholesky factor of H⁻¹, columns are rounded one by one, and the error of each is passed on:

    e = (W_:j - Q(W_:j)) / U_jj,   W_:k −= e · U_jk  for k > j

which makes ‖XWᵀ - XQᵀ‖ small. λ is `damping` times the mean of the diagonal of XᵀX; a feature that is always zero is rounded
to the nearest. Frantar et al. 2022, GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
algorithm 1. https://arxiv.org/abs/2210.17323

The pass comes after `quantize`. It keeps its Q/DQ nodes, formats and scales, and changes the weights they read; after it
Q(W) = W to the last bit. `act_order` takes columns by decreasing diagonal of H: those that matter most first, while there are
others to make up for them. Scales are fixed by then, so that groups stay neighbours in memory. `rescale` chooses the scale of a
group of columns anew when it is reached, from what the weights have become; it goes with columns in their own order.

Layers are treated in the order in which they run, each on what the layers before it give after they were treated; where what
they read is rounded too, that is what H is made of. A matrix that several layers share, or that is a table of embeddings as
well, is treated first, on what all its layers read in the program as it came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from lissom.compiler import grids
from lissom.compiler.editor import Editor
from lissom.compiler.errors import RequirementError, UnsupportedError
from lissom.compiler.grids import FORMATS, Format
from lissom.compiler.hessian import inverse_factor
from lissom.compiler.kinds import Approximation
from lissom.compiler.linears import is_linear
from lissom.compiler.matrices import RoundedMatrix, rounded_matrix_of
from lissom.compiler.observers import weight_scale
from lissom.compiler.protection import is_protected
from lissom.compiler.sweep import sweep_moments

aten = torch.ops.aten

Rescale = Literal["none", "min-max", "mse"]


@dataclass(frozen=True)
class Gptq(Approximation):
    """Moves rounded weights so that layers err least on calibration data.

    act_order: whether columns are treated by decreasing size of what they read, not from the first to the last.
    rescale: whether scales of groups are chosen anew as they are reached, and by which observer.
    tables: whether output heads that share their weight with a table of embeddings are treated, and the table with them.
    damping: what is added to the diagonal of XᵀX, as a share of its mean.
    block_size: columns after which errors are passed on to all that are left; changes the time, not the result.
    skip: module paths that are left alone, with `*` and `?`, divided by commas: `"encoder.layer.0,*.11"`.
    only: module paths that alone are treated, in the same form.
    """

    act_order: bool = True
    rescale: Rescale = "none"
    tables: bool = True
    damping: float = 0.01
    block_size: int = 128
    skip: str = ""
    only: str = ""

    def __post_init__(self) -> None:
        if self.damping <= 0 or self.block_size < 1:
            raise UnsupportedError("gptq takes damping= above 0 and block_size= of 1 or more")
        if self.rescale != "none" and self.act_order:
            raise UnsupportedError(
                "gptq{rescale=...} chooses the scale of a group when its columns are reached together: add act_order=false"
            )

    def run(self, edit: Editor) -> None:
        if not edit.data:
            raise RequirementError("gptq needs calibration data: pass data=, or leave it out, for rounding to the nearest")
        layers = self._layers(edit)
        names = {node: matrix.name for node, matrix in layers.items()}
        tables = [matrix.name for matrix in layers.values() if _is_table(matrix)]
        for finished, (node, read) in enumerate(sweep_moments(edit.program, edit.data, names, tables)):
            edit.report("layers", finished, len(set(names.values())))
            edit.current = node
            self._treat(edit, layers[node], read.gram)

    def _layers(self, edit: Editor) -> dict[fx.Node, RoundedMatrix]:
        """The linear layers to treat, and where their matrices are; the others are reported."""
        layers: dict[fx.Node, RoundedMatrix] = {}
        for node in edit.nodes():
            if not is_linear(node):
                continue
            matrix = rounded_matrix_of(node)
            if isinstance(matrix, str):
                edit.skip(node, matrix)
            elif is_protected(node, self.skip):
                edit.skip(node, "skip= names it")
            elif self.only and not is_protected(node, self.only):
                edit.skip(node, "only= does not name it")
            elif _is_table(matrix) and not self.tables:
                edit.skip(node, "its weight is a table of embeddings too; tables=true treats both")
            else:
                layers[node] = matrix
        return layers

    def _treat(self, edit: Editor, matrix: RoundedMatrix, gram: torch.Tensor) -> None:
        form = FORMATS[str(matrix.quantizer.kwargs["format"])]
        parts = matrix.quantizer.all_input_nodes[1:]
        scale, zero_point = matrix.read_scale(edit.program)
        weight = matrix.read(edit.program)
        if self.rescale == "none":
            matrix.write(edit, gptq(weight, gram, scale, zero_point, form, self.damping, self.block_size, self.act_order))
            return
        rounded, scale, zero_point = gptq_with_scales(weight, gram, scale, zero_point, form, self.damping, self.rescale)
        for part, value in zip(parts, [scale] if zero_point is None else [scale, zero_point], strict=True):
            edit.set_weight(part, (value.T if matrix.transposed else value).contiguous())
        matrix.write(edit, rounded)


def _is_table(matrix: RoundedMatrix) -> bool:
    return any(user.target is aten.embedding.default for user in matrix.quantizer.users)


def gptq(
    weight: torch.Tensor,
    gram: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    form: Format,
    damping: float,
    block_size: int,
    act_order: bool,
) -> torch.Tensor:
    """The matrix on its grid, see the head of this file.

    weight: [features out, features in]; gram: XᵀX; scale, zero_point: [blocks of rows, blocks of columns].
    """
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(gram), device=gram.device)
    factor = inverse_factor(gram[order][:, order], damping)
    # Rows are columns of the matrix, so that each is one piece of memory.
    columns = weight.float().T[order]
    groups = order * scale.shape[1] // len(gram)
    for start in range(0, len(columns), block_size):
        block = columns[start : start + block_size]
        errors = torch.empty_like(block)
        for index in range(len(block)):
            column = start + index
            wanted = block[index] - factor[start:column, column] @ errors[:index]
            block[index] = _rounded(wanted, scale, zero_point, int(groups[column]), form)
            errors[index] = (wanted - block[index]) / factor[column, column]
        columns[start + block_size :] -= factor[start : start + block_size, start + block_size :].T @ errors
    result = torch.empty_like(columns)
    result[order] = columns
    return result.T


def gptq_with_scales(
    weight: torch.Tensor,
    gram: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    form: Format,
    damping: float,
    observer: Literal["min-max", "mse"],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The matrix on its grid, and the scales and zero points of its groups, each chosen when its columns are reached."""
    factor = inverse_factor(gram, damping)
    columns = weight.float().T.clone(memory_format=torch.contiguous_format)
    scale, zero_point = scale.clone(), None if zero_point is None else zero_point.clone()
    size = len(columns) // scale.shape[1]
    for group, start in enumerate(range(0, len(columns), size)):
        block = columns[start : start + size]
        chosen, shifted = weight_scale(block.T, (len(scale), 1), form, observer)
        scale[:, group] = chosen[:, 0].to(scale.dtype)
        if zero_point is not None and shifted is not None:
            zero_point[:, group] = shifted[:, 0].to(zero_point.dtype)
        errors = torch.empty_like(block)
        for index in range(size):
            column = start + index
            wanted = block[index] - factor[start:column, column] @ errors[:index]
            block[index] = _rounded(wanted, scale, zero_point, group, form)
            errors[index] = (wanted - block[index]) / factor[column, column]
        columns[start + size :] -= factor[start : start + size, start + size :].T @ errors
    return columns.T, scale, zero_point


def _rounded(
    column: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, group: int, form: Format
) -> torch.Tensor:
    """A column of the matrix, [features out], with the scales of its group."""
    held = scale[:, group, None], None if zero_point is None else zero_point[:, group, None]
    return grids.dequantize(grids.quantize(column[:, None], *held, form), *held, torch.float32)[:, 0]
