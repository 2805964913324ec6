"""Refit the remaining weights after pruning, so that the outputs stay close to the original; in closed form, without training.

Two methods, both least squares over the tokens of calibration data:

- `refit` goes through the last layers of residual branches, attentions and feed-forwards, in the order of the program. x̃ is
  the layer's input in the current program, with all layers before it pruned and refitted; r̃ and r are the residual streams
  it is added to, in this program and in the one before pruning. Its weight and bias become those of

      min over W̃, b̃   Σ_tokens ‖(r̃ + W̃·x̃ + b̃) - (r + W·x + b)‖² / var(r + W·x + b) + λ ‖W̃ - W‖²

  so that it also corrects the errors of earlier layers. The variance is over the features of a token: the norm after the
  sum divides by its root. λ is chosen by cross-validation. Columns of zeros stay zero. With a norm between the layer and
  the sum, the layer's own result is the target, and all tokens have equal weight. He et al. 2017, Channel Pruning for
  Accelerating Very Deep Neural Networks, §3.2, also regresses on x̃; r̃ - r, the variance and the penalty λ are ours.
- `scale_units` gives each remaining unit one factor m_u, folded into its columns: Kwon et al. 2022, A Fast Post-Training
  Pruning Framework for Transformers, eq. 12. We solve the normal equations, with x of the program before this pass:

      min over m   Σ_tokens ‖Σ_u m_u W_u x_u - W·x‖²
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import fx

from lissom.compiler.analysis.axes.columns import Columns, find_head_columns, find_neuron_columns
from lissom.compiler.analysis.structure.linear import bias_of, input_of, width
from lissom.compiler.analysis.structure.real_tokens import token_mask
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.calibration.partial_run import Stream
from lissom.compiler.calibration.statistics import Moments, Progress, real_rows
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Linear
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample, spread
from lissom.compiler.memory import give_back_memory
from lissom.compiler.transforms.pruning.units import UnitSite

aten = torch.ops.aten

RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
"""The candidates for λ, as fractions of the mean of the diagonal of Σ x̃·x̃ᵀ over half the data."""
_TOKENS_A_FEATURE = 40
"""Tokens per input feature that a layer is fitted to; with more the fit hardly changes."""
_DAMPING = 1e-2
_LEAST_VARIANCE = 1e-6
_LARGEST_FACTOR = 10.0


@dataclass(frozen=True)
class Ending:
    """The last layer of a residual branch, and the corresponding node in the program before pruning.

    Attributes:
        bias: the node that reads its bias; None when it has no bias of its own.
        start: a value before the layer after which few features need to be kept.
        other: the residual stream added to its result; None when another operator comes between, such as a norm.
        reference: the residual add in the other program; the layer when `other` is None.
    """

    columns: Columns
    bias: fx.Node | None
    start: fx.Node
    other: fx.Node | None
    reference: fx.Node

    @property
    def layer(self) -> fx.Node:
        return self.columns.layer


@dataclass
class NormalEquations:
    """Weighted sums over tokens of a layer's inputs, x: [in_features], and its target outputs, y: [out_features].

    Attributes:
        read: Σ (x - shift) and Σ (x - shift)·(x - shift)ᵀ.
        wanted: Σ y.
        product: Σ (x - shift)·yᵀ.
        shift: about the mean of x, which avoids cancellation in its variance; zero when there is no bias.
    """

    read: Moments
    wanted: torch.Tensor
    product: torch.Tensor
    shift: torch.Tensor

    @staticmethod
    def empty(shift: torch.Tensor, out_features: int) -> NormalEquations:
        size, device = len(shift), shift.device
        product = torch.zeros(size, out_features, device=device)
        return NormalEquations(Moments.empty(size, device), torch.zeros(out_features, device=device), product, shift)

    def add(self, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> None:
        """Add tokens.

        Args:
            x: [tokens, in_features].
            y: [tokens, out_features].
            weights: [tokens].
        """
        x, weighted = x.float() - self.shift, y.float() * weights[:, None]
        self.read.add(x, weights)
        self.wanted += weighted.sum(0)
        self.product.addmm_(x.T, weighted)

    def plus(self, other: NormalEquations) -> NormalEquations:
        """The sums over the tokens of both."""
        read = Moments.sum([self.read, other.read])
        return NormalEquations(read, self.wanted + other.wanted, self.product + other.product, self.shift)

    def centred(self, *, with_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ x·xᵀ and Σ x·yᵀ in float64, centred when a bias holds the means."""
        gram, product = self.read.gram.double(), self.product.double()
        if with_bias and self.read.count:
            mean = self.read.total.double() / self.read.count
            gram.addr_(mean, mean, alpha=-self.read.count)
            product.addr_(mean, self.wanted.double(), alpha=-1)
        return gram, product


def solve(halves: list[NormalEquations], weight: torch.Tensor, *, with_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight, [out_features, in_features], and bias that fit the data and stay near the given weight; empties `halves`.

    λ is the candidate in `RIDGES` with the least error in two-fold cross-validation. The error has one minimum over λ, so the
    candidates are tried from the middle downhill.
    """
    # float32 suffices for this choice, with half the memory.
    parts = [(gram.float(), product.float()) for gram, product in (half.centred(with_bias=with_bias) for half in halves)]
    scale = sum(float(gram.diagonal().mean()) for gram, _ in parts) / len(parts)

    @cache
    def error(index: int) -> float:
        ridge = RIDGES[index] * scale
        fitted = [_ridge(*part, weight, ridge) for part in parts]
        return sum(
            float("inf") if fit is None else _error(*held_out, fit) for fit, held_out in zip(fitted, parts[::-1], strict=True)
        )

    best = _valley(error, len(RIDGES))
    parts.clear()
    whole = halves[0].plus(halves[1])
    halves.clear()
    start = weight.double()
    equations = whole.centred(with_bias=with_bias)
    fits = (_ridge(*equations, start, ridge * scale) for ridge in RIDGES[best:])
    fitted = next((fit for fit in fits if fit is not None), start)
    count = whole.read.count or 1.0
    bias = (whole.wanted.double() - fitted @ whole.read.total.double()) / count - fitted @ whole.shift.double()
    return fitted.float(), bias.float()


def _valley(error: Callable[[int], float], count: int) -> int:
    """The index with the least error, searched downhill from the middle."""
    best = count // 2
    for step in (-1, 1):
        while 0 <= best + step < count and error(best + step) < error(best):
            best += step
    return best


def _ridge(gram: torch.Tensor, product: torch.Tensor, start: torch.Tensor, ridge: float) -> torch.Tensor | None:
    """argmin over W of Σ ‖W·x - y‖² + ridge · ‖W - start‖²; None when the Cholesky factorization fails."""
    missing = product - gram @ start.T
    # In place, and subtracted again: a copy of the sums would be the largest tensor in memory.
    gram.diagonal().add_(max(ridge, 1e-9))
    factor, failed = torch.linalg.cholesky_ex(gram)
    gram.diagonal().sub_(max(ridge, 1e-9))
    return None if int(failed) else start + torch.cholesky_solve(missing, factor).T


def _error(gram: torch.Tensor, product: torch.Tensor, weight: torch.Tensor) -> float:
    """Σ ‖W·x - y‖² without the part that does not depend on W."""
    return float(((weight @ gram - 2 * product.T) * weight).sum())


def refit(
    edit: Editor, reference: Program, data: Sequence[Sample], progress: Progress | None = None, *, feed_forward: bool = True
) -> None:
    """Refit the last layer of every residual branch to the reference program; see above.

    Args:
        feed_forward: False refits attentions only.
    """
    endings = _endings(edit, reference, feed_forward=feed_forward)
    widest = max((width(input_of(ending.layer)) for ending in endings), default=1)
    data = spread(data, _TOKENS_A_FEATURE * widest)
    with kept_state(edit.program):
        pruned, whole = Stream(edit.program, data), Stream(reference, data)
        for index, ending in enumerate(endings):
            _refit(edit, ending, pruned, whole, data)
            give_back_memory()
            if progress is not None:
                progress(index + 1, len(endings))


def _refit(edit: Editor, ending: Ending, pruned: Stream, whole: Stream, data: Sequence[Sample]) -> None:
    layer, columns = ending.layer, ending.columns
    weight = columns.read_matrix(edit.program)
    alive = (weight != 0).any(0).nonzero().flatten()
    if not len(alive):
        return
    halves: list[NormalEquations] = []
    for index, sample in enumerate(data):
        # Stop before wide values are computed, and peek at them from there, so that little is kept in memory.
        pruned.advance(index, ending.start)
        (target,) = whole.advance(index, ending.reference, [ending.reference])
        x, *others = pruned.peek(index, [input_of(layer), *([ending.other] if ending.other else [])])
        mask = token_mask(edit.program, sample, layer)
        weights = _weights(real_rows(target, mask), stream=bool(others))
        for other in others:
            target = target - other
        rows, wanted = real_rows(x, mask)[:, alive], real_rows(target, mask)
        if not halves:
            shift = torch.zeros(len(alive), device=weight.device)
            if ending.bias is not None:
                shift = rows.float().mean(0).nan_to_num()
            halves = [NormalEquations.empty(shift, len(weight)) for _ in range(2)]
        middle = len(rows) // 2
        halves[0].add(rows[:middle], wanted[:middle], weights[:middle])
        halves[1].add(rows[middle:], wanted[middle:], weights[middle:])
    fitted, bias = solve(halves, weight[:, alive], with_bias=ending.bias is not None)
    weight[:, alive] = fitted
    columns.write_matrix(edit, weight)
    if ending.bias is not None:
        edit.set_weight(ending.bias, bias.to(nodes.tensor_type(ending.bias).dtype))


def _weights(rows: torch.Tensor, *, stream: bool) -> torch.Tensor:
    """The weight of each token, [tokens]: 1 / variance of the residual stream.

    Args:
        rows: the stream, [tokens, features].
    """
    if not stream or rows.shape[-1] < 2:
        return torch.ones(len(rows), device=rows.device)
    return 1 / rows.float().var(-1).clamp_min(_LEAST_VARIANCE)


def _endings(edit: Editor, reference: Program, *, feed_forward: bool) -> list[Ending]:
    """The layers to refit, in the order of the program; the others are reported."""
    program = edit.program
    transformer = program.fact(structure)
    sites = [
        (find_head_columns(program, site), site.residual, input_of(site.q[0] if site.q else site.output))
        for site in transformer.attention
        if site.output
    ]
    if feed_forward:
        sites += [
            (find_neuron_columns(program, site), site.residual, input_of(site.up[0])) for site in transformer.feed_forward
        ]
    endings: list[Ending] = []
    for columns, residual, start in sites:
        ending = "" if isinstance(columns, str) else _ending(program, reference, columns, residual, start)
        if isinstance(ending, Ending):
            endings.append(ending)
        elif not isinstance(columns, str):
            edit.skip(columns.layer, f"its weights are not refitted: {ending}")
    return sorted(endings, key=lambda ending: ending.layer)


def _ending(program: Program, reference: Program, columns: Columns, residual: fx.Node | None, start: fx.Node) -> Ending | str:
    """The layer as an `Ending`, or why it cannot be refitted."""
    layer = columns.layer
    known = {node.name: node for node in reference.graph.nodes}
    plain = Linear.of(layer)
    if plain is None or plain.weight is not columns.weight:
        return "it is no plain linear layer"
    if _reads(program, columns.weight) > 1:
        return "other layers share its weight"
    if not _same_type(known.get(layer.name), layer):
        return "the program before pruning has no such layer"
    bias = bias_of(layer)
    if bias is not None and (bias.op != "get_attr" or _reads(program, bias) > 1):
        return "its bias is computed, or read elsewhere too"
    joined = residual is not None and layer in residual.all_input_nodes and nodes.argument(residual, "alpha") == 1
    if residual is None or not joined or not _same_type(known.get(residual.name), residual):
        return Ending(columns, bias, start, None, known[layer.name])
    other = next((operand for operand in residual.all_input_nodes if operand is not layer), None)
    return Ending(columns, bias, start, other, known[residual.name])


def _reads(program: Program, weight: fx.Node) -> int:
    """The number of uses of a weight in the program."""
    return sum(len(node.users) for node in program.graph.nodes if node.op == "get_attr" and node.target == weight.target)


def _same_type(left: fx.Node | None, right: fx.Node) -> bool:
    return left is not None and nodes.node_type(left) == nodes.node_type(right)


def scale_units(program: Program, site: UnitSite, moments: Moments, gone: torch.Tensor) -> torch.Tensor:
    """The weight of a site without the removed units, and with the others scaled.

    Args:
        moments: of its layers' inputs.
    """
    held = site.matrix(program)
    weight, gram = held.cpu(), moments.gram.cpu()
    stay = torch.ones(site.count, dtype=torch.bool)
    stay[gone] = False
    products = (weight.T @ weight) * gram
    blocks = torch.stack([products[columns].sum(0) for columns in site.units])
    between = torch.stack([blocks[:, columns].sum(1) for columns in site.units], 1).double()
    factors = torch.zeros(site.count, dtype=torch.float64)
    system = between[stay][:, stay]
    system.diagonal().add_(max(_DAMPING * float(system.diagonal().mean()), 1e-12))
    # Regularized towards one: units whose factor the data does not determine keep their weights.
    missing = between[stay].sum(1) - between[stay][:, stay].sum(1)
    factors[stay] = 1 + torch.linalg.solve(system, missing)
    if float(factors.abs().max()) > _LARGEST_FACTOR:
        factors = stay.double()
    scaled = torch.zeros_like(weight)
    scaled[:, site.units] = weight[:, site.units] * factors[:, None].float()
    return scaled.to(held.device)
