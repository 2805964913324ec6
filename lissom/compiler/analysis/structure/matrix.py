"""The weight matrix of a linear layer, always as [out_features, in_features], whatever its stored orientation.

The experts of a mixture have a stack of matrices, [experts, out_features, in_features].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import fx

from lissom.compiler.analysis.amounts import AmountSite, Legal, site_names
from lissom.compiler.analysis.structure.linear import as_int, is_linear, is_quantizer, second_factor, weight_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import FakeQuantize
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import GROUPED_PRODUCTS, LINEAR_PRODUCTS, TRANSPOSES
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.view_calls import Transpose
from lissom.ops.formats import BYTE_SCALES
from lissom.ops.quantization import fake_quantize

aten = torch.ops.aten

_PRODUCTS = (*LINEAR_PRODUCTS, *GROUPED_PRODUCTS)
_STACKED = "its weight is a stack of the matrices of several experts"


@dataclass(frozen=True)
class Matrix:
    """The weight matrix of a linear layer, or the stack of those of several experts.

    Attributes:
        node: the weight.
        transposed: whether it is stored as [..., in_features, out_features], as in GPT-2.
    """

    node: fx.Node
    transposed: bool

    @property
    def name(self) -> str:
        return str(self.node.target)

    @property
    def shape(self) -> tuple[int, int]:
        """out_features and in_features, of each matrix of a stack."""
        rows, columns = nodes.tensor_type(self.node).shape[-2:]
        return (as_int(columns), as_int(rows)) if self.transposed else (as_int(rows), as_int(columns))

    def read(self, program: Program) -> torch.Tensor:
        """A view of the weight as [..., out_features, in_features]."""
        weight = program.weight(self.name).detach()
        return weight.mT if self.transposed else weight

    def write(self, edit: Editor, matrix: torch.Tensor) -> None:
        """Give the weight new values, in this program only; one place rewritten.

        Args:
            matrix: [..., out_features, in_features].
        """
        matrix = matrix.to(edit.program.weight(self.name).dtype)
        edit.set_weight(self.node, (matrix.mT if self.transposed else matrix).contiguous())
        edit.rewritten += 1


def matrices_of(stack: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of a stack, or the matrix alone where it is none."""
    return [stack] if stack.dim() == 2 else list(stack)


def stack_like(matrices: Sequence[torch.Tensor], stack: torch.Tensor) -> torch.Tensor:
    """The inverse of `matrices_of`: one tensor with as many dimensions as the given one."""
    return matrices[0] if stack.dim() == 2 else torch.stack([*matrices])


def stored_weight(linear: fx.Node) -> tuple[fx.Node, bool]:
    """The weight argument of a product before transposes, and whether it is [in_features, out_features] there."""
    weight, transposed = second_factor(linear), linear.target is not aten.linear.default
    assert weight is not None, f"'{linear.name}' is no product"
    while nodes.is_call(weight, *TRANSPOSES) and _swaps_last(weight):
        weight, transposed = nodes.operand(weight), not transposed
    return weight, transposed


def _swaps_last(node: fx.Node) -> bool:
    """True for a transpose of the last two dimensions."""
    rank = nodes.tensor_type(node).rank
    swapped = Transpose.of(node)
    dims = (0, 1) if swapped is None else (swapped.dim0, swapped.dim1)
    return node.target is aten.mT.default or {dim % rank for dim in dims} == {rank - 2, rank - 1}


def _rank(linear: fx.Node) -> int:
    """The rank of the weight of a product that is a matrix, or a stack of them for experts."""
    return 3 if linear.target in GROUPED_PRODUCTS else 2


def matrix_of(linear: fx.Node, *, stacks: bool = False) -> Matrix | str:
    """The weight matrix of a layer, or why it cannot be changed for this layer alone.

    Args:
        stacks: whether the caller takes the stacked matrices of experts.
    """
    weight = weight_of(linear)
    assert weight is not None, f"'{linear.name}' is no linear layer"
    if linear.target not in _PRODUCTS:
        return "it is a convolution or a batched matrix product"
    if linear.target in GROUPED_PRODUCTS and not stacks:
        return _STACKED
    stored, transposed = stored_weight(linear)
    if is_quantizer(stored):
        return "its weight is quantized already"
    if stored is not weight:
        return "its weight is split, cast or reshaped before it is used"
    form = nodes.tensor_type(weight)
    if form.rank != _rank(linear) or not form.dtype.is_floating_point:
        return "its weight is no floating-point matrix"
    return Matrix(weight, transposed)


Found = TypeVar("Found", bound=Matrix)


@dataclass(frozen=True)
class RoundedMatrix(Matrix):
    """A weight matrix with the Q/DQ node that quantizes it."""

    quantizer: fx.Node

    @property
    def has_block_format(self) -> bool:
        """True where scales are in eight bits, so that others cannot be fitted to the weight."""
        return nodes.tensor_type(FakeQuantize(self.quantizer).scale).dtype in BYTE_SCALES

    def read_scale(self, program: Program) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point, each [..., blocks of out_features, blocks of in_features].

        Scales of a block format are in float32, with that of the tensor.
        """
        values = [program.weight(str(operand.target)).detach() for operand in self.quantizer.all_input_nodes[1:]]
        if self.has_block_format:
            values = [values[0].float() * FakeQuantize(self.quantizer).tensor_scale]
        turned = [value.reshape(1, 1) if value.dim() == 0 else value.mT if self.transposed else value for value in values]
        return turned[0], turned[1] if len(turned) > 1 else None


def rounded_matrix_of(linear: fx.Node, *, stacks: bool = False) -> RoundedMatrix | str:
    """The weight matrix that `lissom::fake_quantize` quantizes for a layer, or why there is none.

    Args:
        stacks: as in `matrix_of`.
    """
    if linear.target not in _PRODUCTS:
        return "it is a convolution or a batched matrix product"
    if linear.target in GROUPED_PRODUCTS and not stacks:
        return _STACKED
    stored, transposed = stored_weight(linear)
    if stored.target is not fake_quantize:
        return "its weight is not quantized"
    weight = FakeQuantize(stored).x
    if weight.op != "get_attr" or nodes.tensor_type(weight).rank != _rank(linear):
        return "its weight is computed before it is quantized"
    return RoundedMatrix(weight, transposed, stored)


def treated_layers(
    edit: Editor,
    find: Callable[[fx.Node], Found | str],
    obstacle: Callable[[fx.Node, Found], str | None],
    passed_over: Collection[fx.Node] = (),
) -> dict[fx.Node, Found]:
    """The linear layers to change, with their matrices; the others are reported as skipped, but for those in `passed_over`.

    Args:
        find: the matrix of a layer, or why it has none.
        obstacle: why a layer is left alone.
    """

    layers = {node: find(node) for node in edit.nodes() if is_linear(node) and node not in passed_over}
    orientations: dict[str, set[bool]] = {}
    for matrix in layers.values():
        if not isinstance(matrix, str):
            orientations.setdefault(matrix.name, set()).add(matrix.transposed)

    def treat(node: fx.Node, matrix: Found | str) -> Found | str:
        if isinstance(matrix, str):
            return matrix
        if (reason := obstacle(node, matrix)) is not None:
            return reason
        return matrix if len(orientations[matrix.name]) == 1 else "its weight is read in both orientations"

    return edit.accepted((node, treat(node, matrix)) for node, matrix in layers.items())


def readers_of(weight: fx.Node) -> list[fx.Node]:
    """The nodes that compute with a weight, directly or through transposes."""
    readers: list[fx.Node] = []
    for user in weight.users:
        readers += readers_of(user) if nodes.is_call(user, *TRANSPOSES) else [user]
    return readers


def weight_sites(layers: Mapping[fx.Node, Matrix], pass_text: str, takes: Callable[[int, int], Legal]) -> dict[str, AmountSite]:
    """The weights as amounts of a pass name them, by their names: by the module paths of the layers that read them.

    Args:
        takes: what the pass takes at a weight with that many out_features and in_features.
    """
    paths: dict[str, dict[str, None]] = {}
    for node, matrix in layers.items():
        paths.setdefault(matrix.name, {})[nodes.origin(node).module_path] = None
    shapes = {matrix.name: matrix.shape for matrix in layers.values()}
    sites: dict[str, AmountSite] = {}
    for name, path in zip(paths, site_names([next(iter(modules)) for modules in paths.values()], [*paths]), strict=True):
        others = [*paths[name]][1:]
        sites[name] = AmountSite("linear", (path, *others), min(shapes[name]), {pass_text: takes(*shapes[name])})
    return sites
