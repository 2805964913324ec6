"""Factor a linear layer into two thin ones: W ≈ U V.

W: [features out, features in], U: [features out, rank], V: [rank, features in]. The layer becomes a linear layer with V and one
with U and the bias, where these two have fewer elements: rank · (out + in) < out · in. X: [tokens, features in] are the layer's
inputs on calibration data, without padding.

With calibration data the factors minimize the layer's output error,

    min over U, V   ‖(X (U V)ᵀ - X₀ Wᵀ) diag(s)^½‖² + λ ‖diag(s)^½ (U V - W)‖²

as in Wang et al. 2024, SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression, §3.1,
https://arxiv.org/abs/2403.07378 (Yuan et al. 2023, ASVD, https://arxiv.org/abs/2312.05821, takes the diagonal of XᵀX alone).
Without data, and with `whiten=false`, it is the truncated SVD of W. How the factors are computed is in
`lissom/passes/lightweight/low_rank/svd.py`. The columns of diag(s)^½ U are orthonormal, so that rounding errors between the two
layers are not amplified.

Four things differ from the paper. Layers are factored in the order in which they run: X is a layer's input with the layers
before it factored, X₀ its input in the original program (`asymmetric`). λ, `damping` times the mean of the diagonal of XᵀX,
keeps the factors near W in directions with little data. s: [features out] weights each output feature by its Fisher
information, the mean square of the gradient of the program's log-likelihood (`fisher`), as rows are weighted in Hsu et al.
2022, Language Model Compression with Weighted Low-rank Factorization, https://arxiv.org/abs/2207.00112. And `budget` allots
ranks to all layers together by energy per byte, where energy is weighted by Fisher information, or is a fraction of each
layer's output energy. Layers with a flat spectrum then stay whole, at the expense of the others.

With `attention` head_dim is reduced: queries with keys, and values with the output projection, form one map each, of rank
head_dim. See `lissom/passes/lightweight/low_rank/head_products.py`. With `budget`, heads keep the same fraction as layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import fx

from lissom.compiler.analysis.amounts import UNCHANGED, Amounts, AmountSite, amounts_text, fraction_of, is_count
from lissom.compiler.analysis.module_filter import obstacle_by_name
from lissom.compiler.analysis.structure.linear import bias_of, input_of
from lissom.compiler.analysis.structure.matrix import Matrix, matrix_of, readers_of, treated_layers, weight_sites
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.calibration.hessian import damped, shifted
from lissom.compiler.calibration.layer_sweep import Counterpart, Read, sweep_moments
from lissom.compiler.calibration.statistics import observe_gradients
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import AddedProduct, Embedding
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import spread
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.compiler.pipeline.spelling import format_pass
from lissom.compiler.transforms.factor_budget import check_amount
from lissom.errors import UnsupportedError
from lissom.passes.lightweight.low_rank.head_products import (
    Factors,
    HeadProduct,
    factors_of,
    gram_of_heads,
    gram_of_weights,
    head_products,
    shorten_heads,
)
from lissom.passes.lightweight.low_rank.svd import Curve, Spectrum, allot, rank_of, relative_error, spectrum

aten = torch.ops.aten

_GRADIENT_TOKENS = 4096
"""Tokens whose gradients are computed; with more their mean squares hardly change."""
_LEAST_FRACTION = 0.1
"""The least weight of a feature, as a fraction of the mean: a sample of tokens cannot show that a feature never matters."""
_LEAST = 1e-30


@dataclass(frozen=True)
class LowRank(Approximation):
    """Replaces a linear layer by two thin ones, by truncated SVD.

    Attributes:
        rank: features between the two layers. Give one of rank, keep and budget, or amounts.
        keep: least fraction of each layer's output energy that its factors keep, above 0 and up to 1.
        budget: fraction of the bytes of all factored weights to keep, above 0 and below 1.
        amounts: ranks of single layers, or fractions of their bytes, by module path, with `*` and `?`:
            `"encoder.layer.0=64,*.query=0.5"`. Without rank, keep and budget, other layers stay whole.
        whiten: minimizes the output error on calibration data, where there is some, rather than the weight error.
        asymmetric: fits layers to the outputs of the original model, rather than to those behind factored layers.
        fisher: weights errors by their effect on the likelihood of the outputs; needs calibration data.
        attention: reduces head_dim where that is possible, rather than factoring the projections.
        damping: regularization towards the original weights, as a fraction of the mean of the diagonal of XᵀX.
        round_to: ranks chosen by keep and budget are a multiple of this.
        lm_head: factors LM heads and classifiers too; those tied to an embedding table never are.
        skip: module paths to leave as they are, with `*` and `?`, separated by commas: `"encoder.layer.0,*.11"`.
        only: module paths to change, in the same form; others stay as they are.
    """

    rank: int | None = None
    keep: float | None = None
    budget: float | None = None
    whiten: bool = True
    asymmetric: bool = True
    fisher: bool = True
    attention: bool = False
    damping: float = 0.01
    round_to: int = 1
    lm_head: bool = False
    skip: str = ""
    only: str = ""
    amounts: str = ""

    def __post_init__(self) -> None:
        self._amounts()
        check_amount("low-rank", rank=self.rank, keep=self.keep, budget=self.budget, amounts=self.amounts)
        if self.attention and self._by_name_only:
            raise UnsupportedError("low-rank{attention=true} takes rank=, keep= or budget=; amounts= names linear layers only")
        if self.damping <= 0 or self.round_to < 1:
            raise UnsupportedError("low-rank takes damping= above 0 and round_to= of 1 or more")

    def run(self, edit: Editor) -> None:
        reference = edit.reference or edit.program.copy()
        layers = self._layers(edit, self._shorten_heads(edit) if self.attention else set())
        ranks = self._named(edit, layers)
        if self._by_name_only:
            layers = {node: matrix for node, matrix in layers.items() if matrix.name in ranks}
        counts = _fisher(edit, layers) if self.fisher and self._whitens(edit) and layers else {}
        if self.budget is not None:
            rest = {node: matrix for node, matrix in layers.items() if matrix.name not in ranks}
            ranks |= self._allotted(edit, rest, counts)
        factors: dict[str, _Factors] = {}
        weights = _Borrowed(edit, layers)
        for node, read in self._reads(edit, layers, Counterpart.of(edit.program, layers, reference)):
            matrix = layers[node]
            weights.give_back()
            weight, hessian = _target(matrix.read(edit.program), read, self.damping)
            decomposed = spectrum(weight, hessian, counts.get(matrix.name))
            rank = ranks[matrix.name] if matrix.name in ranks else self._rank(decomposed.energy)
            if rank is None or rank * sum(weight.shape) >= weight.numel():
                continue
            factors[matrix.name] = _factored(weight, decomposed, rank, read, matrix.read(edit.program).dtype)
            weights.lend(node, factors[matrix.name])
        weights.give_back(shared=True)
        self._tell(edit, layers, {name: factor.u.shape[1] for name, factor in factors.items()})
        _replace(edit, layers, factors)
        if factors:
            edit.note(_errors(list(factors.values()), on_data=self._whitens(edit)))

    @classmethod
    def sites(cls, program: Program) -> Sequence[AmountSite]:
        layers = cls(rank=1, lm_head=True)._layers(Editor(program, cls.name()), set())
        heads = {layers[node].name for node in program.fact(structure).lm_heads if node in layers}
        return [
            replace(site, takes={f"{cls.name()}{{lm_head=true}}": site.takes[cls.name()]}) if name in heads else site
            for name, site in _sites(layers).items()
        ]

    @property
    def _by_name_only(self) -> bool:
        """True if only layers that `amounts` names are factored."""
        return self.rank is None and self.keep is None and self.budget is None

    def _amounts(self) -> Amounts:
        return Amounts.parse(self.amounts, "low-rank{amounts=}", is_count)

    def _named(self, edit: Editor, layers: Mapping[fx.Node, Matrix]) -> dict[str, int | None]:
        """The rank of each weight that `amounts` names, None for a whole one; others are reported. Raises UnsupportedError."""
        sites, ranks = _sites(layers), dict[str, int | None]()
        sizes = {matrix.name: matrix.shape for matrix in layers.values()}
        for (name, site), amount in zip(sites.items(), self._amounts().at([*sites.values()], "linear layers"), strict=True):
            if amount is not None:
                ranks[name] = self._rank_of(site, amount, *sizes[name])
        for node, matrix in layers.items() if self._by_name_only else ():
            if matrix.name not in ranks:
                edit.skip(node, "amounts= does not name it")
        return ranks

    def _rank_of(self, site: AmountSite, amount: str, outputs: int, inputs: int) -> int | None:
        if amount == UNCHANGED:
            return None
        if (fraction := fraction_of(amount)) is not None:
            whole = int(fraction * outputs * inputs / (outputs + inputs)) // self.round_to * self.round_to
            return max(whole, self.round_to)
        if not 1 <= int(amount) <= site.size:
            raise UnsupportedError(
                f"low-rank{{amounts=}}: '{site.path}' is {outputs} × {inputs}, with full rank {site.size}, and cannot have "
                f"rank {amount}; give 1 to {site.size}, or a fraction of its bytes"
            )
        return int(amount)

    def _tell(self, edit: Editor, layers: Mapping[fx.Node, Matrix], ranks: Mapping[str, int]) -> None:
        """Record the pass with the ranks that were chosen."""
        sites = _sites(layers)
        text = amounts_text([*sites.values()], [ranks.get(name) for name in sites])
        if text and not self.attention:
            edit.per_site = format_pass(
                replace(self, rank=None, keep=None, budget=None, amounts=text, round_to=1, skip="", only="")
            )

    def _whitens(self, edit: Editor) -> bool:
        return self.whiten and bool(edit.data)

    def _rank(self, energy: torch.Tensor) -> int:
        if self.keep is None:
            assert self.rank is not None, "one of rank, keep and budget is set"
            return self.rank
        return -(-rank_of(energy, self.keep) // self.round_to) * self.round_to

    def _reads(
        self, edit: Editor, layers: Mapping[fx.Node, Matrix], counterpart: Counterpart | None
    ) -> Iterator[tuple[fx.Node, Read | None]]:
        """One layer of each weight, with the moments of its inputs on calibration data; None where they are not used."""
        names = {node: matrix.name for node, matrix in layers.items()}
        pairs: Iterable[tuple[fx.Node, Read | None]] = {name: (node, None) for node, name in names.items()}.values()
        if self._whitens(edit):
            pairs = sweep_moments(edit.program, edit.data, names, counterpart=counterpart if self.asymmetric else None)
        for finished, (node, read) in enumerate(pairs):
            edit.report("layers", finished, len(set(names.values())))
            edit.current = node
            yield node, read

    def _allotted(
        self, edit: Editor, layers: Mapping[fx.Node, Matrix], counts: Mapping[str, torch.Tensor]
    ) -> dict[str, int | None]:
        """The rank of each weight within the budget, from the program before this pass; None where it stays whole."""
        assert self.budget is not None, "only called with a budget"
        curves: dict[str, Curve] = {}
        for node, read in self._reads(edit, layers, None):
            matrix = layers[node]
            weight = matrix.read(edit.program)
            energy = spectrum(*_target(weight, read, self.damping), counts.get(matrix.name)).energy
            gains = torch.stack([part.sum() for part in energy.split(self.round_to)]).cpu()
            if not counts:
                gains /= gains.sum().clamp_min(1e-300)
            step_bytes = self.round_to * sum(weight.shape) * weight.element_size()
            curves[matrix.name] = Curve(gains, step_bytes, weight.nbytes)
        whole = sum(curve.whole_bytes for curve in curves.values())
        least = sum(min(curve.step_bytes, curve.whole_bytes) for curve in curves.values())
        if least > self.budget * whole:
            raise UnsupportedError(
                f"low-rank{{budget={self.budget:g}}} leaves {int(self.budget * whole)} bytes for {len(curves)} weights, and "
                f"rank {self.round_to} takes {least} of their {whole}: give budget={least / whole:.2g} or more, or name layers "
                "to leave alone with skip="
            )
        steps = allot(list(curves.values()), int(self.budget * whole))
        return {name: None if count is None else count * self.round_to for name, count in zip(curves, steps, strict=True)}

    def _shorten_heads(self, edit: Editor) -> set[fx.Node]:
        """Reduce head_dim; returns the layers that project into and out of these heads."""
        products: list[HeadProduct] = []
        for site in edit.program.fact(structure).attention:
            edit.current = site.node
            for pair in head_products(edit.program, site):
                reason = pair if isinstance(pair, str) else self._obstacle_by_name(pair.first.layer, pair.second.layer)
                if edit.may_change(site.node, reason) and isinstance(pair, HeadProduct):
                    products.append(pair)
        seen = gram_of_heads(edit, products) if self._whitens(edit) and products else {}
        chosen: list[tuple[HeadProduct, Factors, int]] = []
        for product in products:
            factors = factors_of(edit.program, product, seen or gram_of_weights(edit.program, product), self.damping)
            if self.budget is not None:
                rank = max(int(self.budget * product.head_dim) // self.round_to, 1) * self.round_to
            else:
                rank = self._rank(torch.stack([energy for _, _, energy in factors]).sum(0))
            if rank < product.head_dim:
                chosen.append((product, factors, rank))
            else:
                edit.skip(product.node, "heads of the chosen rank would be no shorter")
        return shorten_heads(edit, chosen) if chosen else set()

    def _layers(self, edit: Editor, treated: set[fx.Node]) -> dict[fx.Node, Matrix]:
        """The linear layers to factor, with their matrices; others not in `treated` are reported as skipped."""
        layers = treated_layers(edit, matrix_of, partial(self._obstacle, edit.program), treated)
        shared = [node for node, matrix in layers.items() if not layers.keys() >= {*readers_of(matrix.node)}]
        for node in shared:
            edit.skip(node, "its weight is also read by operators that are not factored")
        return {node: matrix for node, matrix in layers.items() if node not in shared}

    def _obstacle_by_name(self, *layers: fx.Node) -> str | None:
        return obstacle_by_name(*layers, skip=self.skip, only=self.only)

    def _obstacle(self, program: Program, node: fx.Node, matrix: Matrix) -> str | None:
        """The reason a layer is left unchanged; None if it can be factored."""
        transformer = program.fact(structure)
        if reason := self._obstacle_by_name(node):
            return reason
        if any(Embedding(embedding.node).table is matrix.node for embedding in transformer.embeddings):
            return "its weight is an embedding table too"
        if node in transformer.lm_heads and not self.lm_head:
            return "it is an LM head or classifier; lm_head=true includes it"
        if node in {site.router for site in transformer.mixtures}:
            return "it is the router of a mixture of experts"
        if "low-rank" in nodes.origin(node).passes:
            return "it is a factor already"
        if node.target is aten.addmm.default and (node.kwargs or nodes.tensor_type(AddedProduct(node).bias).rank != 1):
            return "it adds more than a bias"
        return None


def _sites(layers: Mapping[fx.Node, Matrix]) -> dict[str, AmountSite]:
    """The weights as amounts name them, by their names; each takes the ranks whose factors are smaller than it."""
    return weight_sites(layers, LowRank.name(), lambda rows, columns: range(1, -(-rows * columns // (rows + columns))))


@dataclass(frozen=True)
class _Factors:
    """The factors u: [features out, rank] and v: [rank, features in] of a weight, in its dtype.

    Attributes:
        errors: relative errors of the layer's output on the data with u v and with plain SVD of that rank; then of its weights.
    """

    u: torch.Tensor
    v: torch.Tensor
    errors: tuple[float, ...]


@dataclass
class _Borrowed:
    """Weights replaced by U V while later layers are calibrated, and restored afterwards, so that few are stored twice."""

    edit: Editor
    layers: Mapping[fx.Node, Matrix]
    _lent: list[tuple[fx.Node, torch.Tensor, bool]] = field(default_factory=list)

    def lend(self, node: fx.Node, factors: _Factors) -> None:
        matrix = self.layers[node]
        original = self.edit.program.weight(matrix.name)
        product = factors.u @ factors.v
        self.edit.set_weight(matrix.node, (product.T if matrix.transposed else product).contiguous())
        self._lent.append((matrix.node, original, len(readers_of(matrix.node)) > 1))

    def give_back(self, *, shared: bool = False) -> None:
        """Restore the weights that the sweep has passed; with `shared` also those that later layers may read."""
        for node, original, several in self._lent:
            if shared or not several:
                self.edit.set_weight(node, original)
        self._lent = [loan for loan in self._lent if loan[2] and not shared]


def _replace(edit: Editor, layers: Mapping[fx.Node, Matrix], factors: Mapping[str, _Factors]) -> None:
    """Replace each layer whose weight has factors by two layers; layers that share a weight share the factors."""
    reads: dict[str, tuple[fx.Node, fx.Node]] = {}
    for node, matrix in layers.items():
        edit.current = node
        if matrix.name not in factors:
            edit.skip(node, "factors of the chosen rank would be no smaller")
            continue
        with edit.before(node):
            if matrix.name not in reads:
                pair = factors[matrix.name]
                parts = [(f"{matrix.name}_v", pair.v), (f"{matrix.name}_u", pair.u)]
                v, u = (edit.weight(name, edit.like(matrix.node, part.contiguous())) for name, part in parts)
                reads[matrix.name] = v, u
            v, u = reads[matrix.name]
            thin = edit.call(aten.linear.default, input_of(node), v)
            edit.replace(node, edit.call(aten.linear.default, thin, u, bias_of(node)))


def _fisher(edit: Editor, layers: Mapping[fx.Node, Matrix]) -> dict[str, torch.Tensor]:
    """s of each weight: Σ over tokens of the squared gradient of its layers' outputs, [features out]; all positive."""
    squares: dict[str, torch.Tensor] = {}

    def add(node: fx.Node, value: torch.Tensor, gradient: torch.Tensor, mask: torch.Tensor | None) -> None:
        squared = gradient.double().square().flatten(0, -2).sum(0)
        name = layers[node].name
        squares[name] = squares[name] + squared if name in squares else squared

    observe_gradients(edit.program, spread(edit.data, _GRADIENT_TOKENS), set(layers), add, partial(edit.report, "gradients"))
    return {name: (sums + _LEAST_FRACTION * sums.mean()).clamp_min(_LEAST) for name, sums in squares.items()}


def _target(weight: torch.Tensor, read: Read | None, damping: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W* and XᵀX + λI for which ‖XW'ᵀ - X₀Wᵀ‖² + λ‖W' - W‖² = ‖(W' - W*)(XᵀX + λI)^½‖² plus a constant."""
    if read is None:
        return weight, None
    gram = read.moments.gram
    if read.shift is not None:
        weight = shifted(weight, gram, read.shift, damping)
    return weight, damped(gram, damping)


def _factored(weight: torch.Tensor, decomposed: Spectrum, rank: int, read: Read | None, dtype: torch.dtype) -> _Factors:
    """The factors, with the errors of their product and of plain SVD."""
    u, v = decomposed.truncated(rank)
    plain = torch.mm(*spectrum(weight).truncated(rank))
    gram = None if read is None else read.moments.gram
    errors = [relative_error(weight, approximation, known) for known in (gram, None) for approximation in (u @ v, plain)]
    return _Factors(u.to(dtype), v.to(dtype), tuple(errors))


def _errors(factors: Sequence[_Factors], *, on_data: bool) -> str:
    """The relative errors of the layers in words, as root mean squares over them."""
    squares = torch.tensor([factor.errors for factor in factors], dtype=torch.float64).square().mean(0)
    data, plain_data, weights, plain_weights = (f"{error:.1%}" for error in squares.sqrt().tolist())
    count = f"{len(factors)} weight{'s' * (len(factors) > 1)}"
    if not on_data:
        return f"{count} in factors: root-mean-square relative error of weights {weights}"
    return (
        f"{count} in factors: root-mean-square relative error of outputs on the calibration data {data}, with plain SVD "
        f"{plain_data}; of weights {weights}, with plain SVD {plain_weights}"
    )
