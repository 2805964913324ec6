"""Low-rank factors of the products inside attention heads: queries with keys, and values with the output projection.

For one head, let q, k, v: [head_dim] be those of a token, and z: [head_dim] a weighted mean of v over tokens, which the output
projection W_o multiplies with its columns W_oh. For matrices A, B with rank < head_dim rows,

    qᵀk ≈ (A q)ᵀ (B k)        W_oh z ≈ U (V z)

A and B are folded into the projections of q and k, with their biases; V into that of v; and U replaces W_oh. The scale of the
scores stays 1/√head_dim, with the original head_dim. With G_q = Σ q qᵀ = S_q S_qᵀ and likewise G_k, the squared error of the
scores of all pairs of tokens, ‖S_qᵀ (AᵀB - I) S_k‖², is least for

    P Σ Qᵀ = S_qᵀ S_k,   A = Σ_r^½ P_rᵀ S_q⁻¹,   B = Σ_r^½ Q_rᵀ S_k⁻¹

and that of the outputs for the factors of `svd.spectrum` with H = Σ z zᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from lissom.compiler.analysis.axes.axes import axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.columns import WeightUnits, unit_of
from lissom.compiler.analysis.structure.attention import AttentionSite
from lissom.compiler.analysis.structure.linear import bias_of, input_of, width
from lissom.compiler.analysis.structure.matrix import Matrix, matrix_of, readers_of
from lissom.compiler.analysis.structure.operands import PLAIN
from lissom.compiler.calibration.hessian import damped
from lissom.compiler.calibration.statistics import observe
from lissom.compiler.ir.calls import Attention
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.match import is_own_weight
from lissom.compiler.ir.program import Program
from lissom.compiler.transforms.heads.layers import HeadLayer, is_moved
from lissom.compiler.transforms.removal.indices import remove_indices
from lissom.errors import LissomError
from lissom.passes.lightweight.low_rank.svd import spectrum

aten = torch.ops.aten


@dataclass(frozen=True)
class HeadProduct:
    """One product of every head of an attention.

    Attributes:
        node: the attention.
        first: the layer of q, or of v.
        second: the layer of k, or the output projection.
        scores: true for q and k.
        axis: the axis of head_dim, which is reduced.
        heads: the number of heads.
        head_dim: the size of a head.
    """

    node: fx.Node
    first: HeadLayer
    second: HeadLayer
    scores: bool
    axis: Axis
    heads: int
    head_dim: int

    @property
    def observed(self) -> tuple[fx.Node, ...]:
        """The values observed on calibration data: q and k; or z, the input of the output projection."""
        return (self.first.layer, self.second.layer) if self.scores else (input_of(self.second.layer),)


def head_products(program: Program, site: AttentionSite) -> list[HeadProduct | str]:
    """The products of one attention, scores first; the reason in place of one that cannot be factored."""
    if site.positions == "rotary":
        scores = "rotary embedding is applied to its queries and keys"
    elif site.node.target is not PLAIN and site.scale is None:
        scores = "the scale of its scores cannot be set"
    else:
        scores = _product(program, site, site.q, site.k, scores=True)
    output = () if site.output is None else (site.output,)
    return [scores, _product(program, site, site.v, output, scores=False)]


def _product(
    program: Program, site: AttentionSite, first: Sequence[fx.Node], second: Sequence[fx.Node], *, scores: bool
) -> HeadProduct | str:
    what = "queries and keys" if scores else "values and outputs"
    if len(first) != 1 or len(second) != 1 or site.packed or first == second:
        return f"its {what} are not from two separate layers"
    if site.heads != site.key_value_heads:
        return "query heads share key/value heads"
    attention = Attention(site.node)
    between = [(attention.q, first[0]), (attention.k, second[0])]
    between = between if scores else [(attention.v, first[0]), (input_of(second[0]), site.node)]
    if not all(is_moved(*pair) for pair in between):
        return f"other operators are between the layers of its {what} and their product"
    program_axes = program.fact(axes)
    value = attention.q if scores else site.node
    heads, axis = (program_axes.axis(value, dim) for dim in (-3, -1))
    obstacle = program_axes.obstacle(axis) if axis.form == "atom" else "it is made of several axes"
    if obstacle:
        return f"head_dim of its {what} cannot be reduced: {obstacle}"
    # Queries and keys may have another head_dim than values.
    head_dim = width(value)
    layers: list[HeadLayer] = []
    for layer, dim in ((first[0], 0), (second[0], 0 if scores else 1)):
        matrix = matrix_of(layer)
        if isinstance(matrix, str):
            return matrix
        unit = unit_of(program_axes.axis(matrix.node, dim), (heads, axis))
        if matrix.transposed or not _is_owned(layer, matrix) or not torch.equal(unit, torch.arange(len(unit))):
            return f"the weights of its {what} are shared, or contain more than its heads"
        head, bias = torch.arange(site.heads).repeat_interleave(head_dim), bias_of(layer)
        made = WeightUnits(bias, 0, head) if bias is not None and dim == 0 else None
        layers.append(HeadLayer(layer, WeightUnits(matrix.node, dim, head), made))
    return HeadProduct(site.node, layers[0], layers[1], scores, axis, site.heads, head_dim)


def _is_owned(layer: fx.Node, matrix: Matrix) -> bool:
    """True for `linear` whose weight and bias have no other readers."""
    if layer.target is not aten.linear.default or readers_of(matrix.node) != [layer]:
        return False
    return (bias := bias_of(layer)) is None or is_own_weight(bias)


def gram_of_heads(edit: Editor, products: Sequence[HeadProduct]) -> dict[fx.Node, torch.Tensor]:
    """Σ x xᵀ over tokens for each head of the observed values, [heads, head_dim, head_dim]."""
    sums: dict[fx.Node, torch.Tensor] = {}
    heads = {node: product.heads for product in products for node in product.observed}

    def add(node: fx.Node, rows: torch.Tensor) -> None:
        parts = rows.float().unflatten(-1, (heads[node], -1)).transpose(0, 1)
        gram = parts.mT @ parts
        sums[node] = sums[node] + gram if node in sums else gram

    observe(edit.program, edit.data, heads, add, partial(edit.report, "heads"))
    return sums


def gram_of_weights(program: Program, product: HeadProduct) -> dict[fx.Node, torch.Tensor]:
    """The Gram matrix of each head, as of `gram_of_heads`, for independent inputs of unit variance, without biases."""
    chosen = (product.first, product.second) if product.scores else (product.first,)
    rows = (layer.weight.read(program).float() for layer in chosen)
    return {node: part @ part.mT for node, part in zip(product.observed, rows, strict=True)}


def score_factors(query: torch.Tensor, key: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A and B of full rank, rows in descending order, and the energy each adds to Σ (qᵀk)².

    Args:
        query: G_q, key: G_k.
    """
    left, right = (torch.linalg.cholesky(damped(gram, damping)) for gram in (query, key))
    directions, values, others = torch.linalg.svd(left.T @ right)
    root = values.sqrt()[:, None]
    a = torch.linalg.solve_triangular(left, root * directions.T, upper=False, left=False)
    b = torch.linalg.solve_triangular(right, root * others, upper=False, left=False)
    return a, b, values.square()


def value_factors(columns: torch.Tensor, gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """V and Uᵀ of full rank, rows in descending order, and the energy each adds to Σ ‖W_oh z‖².

    Args:
        columns: W_oh, gram: Σ z zᵀ.
    """
    decomposed = spectrum(columns, damped(gram, damping))
    u, v = decomposed.truncated(len(decomposed.energy))
    return v, u.T, decomposed.energy


def factors_of(
    program: Program, product: HeadProduct, grams: dict[fx.Node, torch.Tensor], damping: float
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each head the rows of both factors in descending order, and the energy each adds."""
    if product.scores:
        pairs = zip(*(grams[node] for node in product.observed), strict=True)
        return [score_factors(query, key, damping) for query, key in pairs]
    columns = product.second.weight.read(program).mT
    return [value_factors(part, gram, damping) for part, gram in zip(columns, grams[product.observed[0]], strict=True)]


Factors = Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""For each head both factors and energies, as returned by `factors_of`."""


def shorten_heads(edit: Editor, chosen: Sequence[tuple[HeadProduct, Factors, int]]) -> set[fx.Node]:
    """Write the factors of these ranks into the layers, and reduce head_dim to the rank.

    Returns the changed layers: none where head_dim cannot be reduced, which is reported then.
    """
    program_axes, before, rewritten = edit.program.fact(axes), edit.program.weights(), edit.rewritten
    removed = {product.axis: range(rank, product.head_dim) for product, _, rank in chosen}
    for product, factors, rank in chosen:
        edit.current = product.node
        first, second, _ = zip(*factors, strict=True)
        _set_rows(edit, product.first, _times(edit.program, product.first, first), rank)
        second = _times(edit.program, product.second, second) if product.scores else second
        _set_rows(edit, product.second, second, rank)
    try:
        remove_indices(edit, removed, program_axes)
    except LissomError as error:
        for node in [node for node in edit.program.graph.nodes if node.op == "get_attr"]:
            if edit.program.weight(str(node.target)) is not before[str(node.target)]:
                edit.set_weight(node, before[str(node.target)])
        edit.rewritten = rewritten
        for product, _, _ in chosen:
            edit.skip(product.node, str(error))
        return set()
    edit.rewritten = rewritten + len(chosen)
    return {layer.layer for product, _, _ in chosen for layer in (product.first, product.second)}


def _times(program: Program, layer: HeadLayer, factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each head's factor times its rows of a layer, bias included."""
    return [factor.cpu() @ rows for factor, rows in zip(factors, layer.read(program), strict=True)]


def _set_rows(edit: Editor, layer: HeadLayer, rows: Sequence[torch.Tensor], rank: int) -> None:
    """Set each head of a layer to the first `rank` of these rows, followed by zeros at the indices that will be removed."""
    new = layer.read(edit.program).zero_()
    for head, head_rows in zip(new, rows, strict=True):
        head[:rank] = head_rows[:rank]
    layer.write(edit, new)
