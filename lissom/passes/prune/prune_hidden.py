"""Narrow the residual stream: zero one set of channels in all layers, embeddings and norms together.

All weights with the stream's width as a dimension get zeros at these channels: layers then write zero to them, norms return
zero for them, and layers ignore them. `eliminate-dead`, which runs right after it, removes them.

- `energy`: Σ_r E[x_c²] · ‖W_r[:, c]‖² over the layers r that read the stream, each divided by its sum over channels, with x
  the layer's inputs on calibration data, without padding. It is Wanda's score of a weight, squared and summed over rows
  and layers: Sun et al. 2023, equation 1. https://arxiv.org/abs/2306.11695
- `magnitude`: Σ_w ‖w[c]‖² over the weights w, each divided by its sum over channels. Needs no data. Fang et al. 2023,
  DepGraph: Towards Any Structural Pruning, equation 4. https://arxiv.org/abs/2301.12900
- `first`: channels keep their order, and the last are pruned. For streams after `rotate{where=residual,basis=pca}`.
- `auto`: of the choices of `energy` and `first` the one after which refitted layers err less, by the moments of their inputs
  in the original program; without `reconstruct` that of `energy`.

With `reconstruct`, layers that read the stream are refitted in order: x and x̃ are a layer's inputs in the original and in the
pruned program, and W̃ minimizes E‖W x + b − W̃ x̃ − b̃‖² + λ‖W̃ − W‖², so

    W̃ = W + W (Cov(x, x̃) − Cov(x̃, x̃)) (Cov(x̃, x̃) + λI)⁻¹        b̃ = b + W E[x] − W̃ E[x̃]

with λ the one of `DAMPINGS` that, fitted to half of the tokens, leaves the least error on the other half; without a bias the
moments are not centred. Where the data says nothing, W stays. He et al. 2017, Channel Pruning for Accelerating Very Deep
Neural Networks, equation 2. https://arxiv.org/abs/1707.06168 An LM head tied to an embedding table keeps its weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import fx

from lissom.compiler.analysis.amounts import Amounts, AmountSite, amounts_text, is_count, site_names
from lissom.compiler.analysis.axes.axes import Axes, axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.zeros import zero_at, zeros
from lissom.compiler.analysis.structure.linear import input_of, is_linear
from lissom.compiler.analysis.structure.matrix import Matrix, matrix_of, readers_of
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.calibration.hessian import damped, unpredicted
from lissom.compiler.calibration.layer_sweep import sweep
from lissom.compiler.calibration.statistics import Moments, check_finite, observe
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.printer import place
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Approximation
from lissom.compiler.pipeline.spelling import format_pass
from lissom.compiler.transforms.removal.indices import mask
from lissom.errors import RequirementError, UnsupportedError

DAMPINGS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""λ over the mean of Var(x̃). A few channels of a language model are so large that a hundredth of the mean hides the others."""
_KEEP = 0.75
_COMPARED = 8
"""Layers by which two choices of channels are compared, up to twice as many."""


@dataclass(frozen=True)
class PruneHidden(Approximation):
    """Zeroes the least important channels of the residual stream in all layers.

    Attributes:
        keep: fraction of channels to keep, above 0 and below 1; of the residual streams that `amounts` does not name. 0.75
            where neither is given.
        amounts: channels of single residual streams, a number or a fraction; a stream is named by the module of its first
            residual add, with `*` and `?`: `"encoder=384,decoder=none"`. Without `keep`, other streams stay as they are.
        round_to: the number of channels kept is a multiple of this.
        criterion: how channels are ranked; `auto` and `energy` need calibration data, `first` keeps the order of
            `rotate{basis=pca}`.
        reconstruct: refits the layers that read the residual stream to their earlier outputs; needs calibration data.
    """

    keep: float | None = None
    round_to: int = 8
    criterion: Literal["auto", "energy", "magnitude", "first"] = "auto"
    reconstruct: bool = True
    amounts: str = ""
    leaves_dead = True
    requires = (FLOATING_POINT_WEIGHTS,)

    def __post_init__(self) -> None:
        self._amounts()
        if not (self.keep is None or 0 < self.keep < 1) or self.round_to < 1:
            raise UnsupportedError("prune-hidden takes keep= above 0 and below 1, and round_to= of 1 or more")

    def _amounts(self) -> Amounts:
        return Amounts.parse(self.amounts, "prune-hidden{amounts=}", is_count)

    @classmethod
    def sites(cls, program: Program) -> Sequence[AmountSite]:
        try:
            return _sites(_streams(program))
        except UnsupportedError:
            # It says why the program has no streams that can be narrowed.
            return ()

    def run(self, edit: Editor) -> None:
        if not edit.data and (self.reconstruct or self.criterion in ("auto", "energy")):
            raise RequirementError(
                "prune-hidden needs calibration data: pass data=, or choose criterion=magnitude and reconstruct=false"
            )
        dense = edit.program.copy()
        kept: dict[fx.Node, torch.Tensor] = {}
        streams = _streams(edit.program)
        sites = _sites(streams)
        given = self._amounts().counts(sites, "residual streams", round_to=self.round_to)
        for (axis, total), amount in zip(streams.items(), given, strict=True):
            if amount == axis.size or (amount is None and self.keep is None and self.amounts):
                continue
            kept[total] = self._chosen(edit, axis, total, amount)
        left = [int(kept[total].sum()) if total in kept else axis.size for axis, total in streams.items()]
        text = amounts_text(sites, left)
        edit.per_site = format_pass(replace(self, keep=None, amounts=text, round_to=PruneHidden.round_to))
        _zero(edit, _on_axes(edit.program, kept))
        _check(edit, _on_axes(edit.program, kept))
        if self.reconstruct:
            _reconstruct(edit, dense, _on_axes(edit.program, kept))

    def _chosen(self, edit: Editor, axis: Axis, total: fx.Node, amount: int | None) -> torch.Tensor:
        """The channels to keep by the criterion, booleans [channels]."""
        first = -torch.arange(int(axis.size), dtype=torch.float32)
        if self.criterion == "first":
            return self._kept(edit, total, first, amount)
        if self.criterion == "magnitude":
            return self._kept(edit, total, _magnitudes(edit.program, axis), amount)
        is_compared = self.criterion == "auto" and self.reconstruct
        scores, layers = _energies(edit, axis, with_moments=is_compared)
        choices = [self._kept(edit, total, ranks, amount) for ranks in ([scores, first] if is_compared else [scores])]
        return min(choices, key=partial(_missed, layers))

    def _kept(self, edit: Editor, total: fx.Node, scores: torch.Tensor, amount: int | None) -> torch.Tensor:
        """The channels to keep, booleans [channels].

        Args:
            amount: their number, where `amounts` names the stream.
        """
        channels, step, keep = len(scores), self.round_to, _KEEP if self.keep is None else self.keep
        count = max(step, round(keep * channels / step) * step) if amount is None else amount
        if count >= channels:
            most = (channels - 1) // step * step
            possible = f"keep={most / channels:.2g} or less is possible" if most else "leave out round_to="
            raise UnsupportedError(
                f"prune-hidden{{keep={keep:g}}} removes none of the {channels} channels of {place(edit.program, total)}, "
                f"rounded to multiples of {step}; {possible}"
            )
        kept = torch.zeros(channels, dtype=torch.bool)
        kept[scores.topk(count).indices.cpu()] = True
        return kept


def _streams(program: Program) -> dict[Axis, fx.Node]:
    """The channel axes of the residual streams, each with a residual add that has it.

    Raises:
        UnsupportedError: when there are none, or one is a product of axes.
    """
    program_axes = program.fact(axes)
    streams: dict[Axis, fx.Node] = {}
    for total in program.fact(structure).residuals:
        streams.setdefault(program_axes.axis(total, -1), total)
    if not streams:
        raise UnsupportedError("prune-hidden finds no residual stream in this program")
    for axis, total in streams.items():
        if axis.form != "atom" or not isinstance(axis.size, int):
            raise UnsupportedError(
                f"prune-hidden cannot tell the channels of {place(program, total)} apart: "
                f"the model folds them into other dimensions"
            )
    return streams


def _sites(streams: Mapping[Axis, fx.Node]) -> list[AmountSite]:
    """The residual streams as amounts name them."""
    totals = list(streams.values())
    names = site_names([nodes.origin(total).module_path for total in totals], [total.name for total in totals])
    sizes = [int(axis.size) for axis in streams]
    takes = [{"prune-hidden": range(1, size + 1)} for size in sizes]
    return [AmountSite("channels", (name,), size, legal) for name, size, legal in zip(names, sizes, takes, strict=True)]


def _on_axes(program: Program, kept: Mapping[fx.Node, torch.Tensor]) -> dict[Axis, torch.Tensor]:
    """The channels to keep, by their axes in the current program."""
    program_axes = program.fact(axes)
    return {program_axes.axis(total, -1): channels for total, channels in kept.items()}


def _weights_on(program: Program, program_axes: Axes, streams: Sequence[Axis]) -> list[tuple[fx.Node, int]]:
    """The floating-point weights with one of the axes, and its dimension."""
    places = [(occurrence.node, occurrence.dim) for axis in streams for occurrence in program_axes.occurrences(axis)]
    return [
        (node, dim)
        for node, dim in dict.fromkeys(places)
        if node.op == "get_attr" and program.weight(str(node.target)).is_floating_point()
    ]


def _readers(program: Program, program_axes: Axes, axis: Axis) -> list[fx.Node]:
    """The linear layers that read channels of the axis."""
    return [node for node in program.nodes() if is_linear(node) and program_axes.axis(input_of(node), -1) is axis]


def _magnitudes(program: Program, axis: Axis) -> torch.Tensor:
    program_axes, scores = program.fact(axes), torch.zeros(int(axis.size))
    for node, dim in _weights_on(program, program_axes, [axis]):
        if program_axes.axis(node, dim) is axis:
            weight = program.weight(str(node.target)).detach().float().cpu()
            scores += _fractions(weight.square().movedim(dim, 0).flatten(1).sum(1) if weight.dim() > 1 else weight.square())
    return scores


def _energies(edit: Editor, axis: Axis, *, with_moments: bool) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The energies of the channels, [channels], and C = Σ x xᵀ and B = WᵀW of layers that read them, [channels, channels].

    Args:
        with_moments: C and B of some layers, spread over the depth; else of none.
    """
    scores = torch.zeros(int(axis.size))
    readers = {node: matrix_of(node) for node in _readers(edit.program, edit.program.fact(axes), axis)}
    weights = {node: matrix.read(edit.program) for node, matrix in readers.items() if isinstance(matrix, Matrix)}
    compared = list(weights)[:: max(1, len(weights) // _COMPARED)] if with_moments else []
    sums = {node: Moments.empty(int(axis.size), nodes.tensor_type(node).device) for node in map(input_of, compared)}
    squares: dict[fx.Node, torch.Tensor] = {}

    def visit(node: fx.Node, rows: torch.Tensor) -> None:
        squares[node] = squares.get(node, 0) + rows.float().square().sum(0).cpu()
        if node in sums:
            check_finite(edit.program, node, rows)
            sums[node].add(rows)

    observe(edit.program, edit.data, {input_of(node) for node in readers}, visit)
    for node in readers:
        if input_of(node) in squares:  # and not a product of constants, such as DeBERTa's of relative positions
            weight = weights[node].float().square().sum(0).cpu() if node in weights else 1.0
            scores += _fractions(squares[input_of(node)] * weight)
    large = ((sums[input_of(node)].gram.double().cpu(), weights[node].double().cpu()) for node in compared)
    return scores, [(gram, weight.T @ weight) for gram, weight in large]


def _missed(layers: Sequence[tuple[torch.Tensor, torch.Tensor]], kept: torch.Tensor) -> float:
    """The energy of W x that no layer of the kept channels predicts, as a sum of fractions."""
    missed = 0.0
    for gram, own in layers:
        inner = damped(gram[kept][:, kept], DAMPINGS[-1]).to(gram.dtype)
        missed += float(unpredicted(gram, own, gram[:, kept], inner) / (own * gram).sum().clamp_min(1e-30))
    return missed


def _fractions(values: torch.Tensor) -> torch.Tensor:
    return values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)


def _zero(edit: Editor, kept: Mapping[Axis, torch.Tensor]) -> None:
    """Zero the pruned channels in every weight that has them."""
    program_axes = edit.program.fact(axes)
    gone = {place: ~mask(program_axes.axis(*place), kept) for place in _weights_on(edit.program, program_axes, [*kept])}
    for (node, dim), indices in gone.items():
        weight = edit.tensor(node)
        edit.set_weight(node, weight.index_fill(dim, indices.nonzero().flatten().to(weight.device), 0))
        edit.rewritten += 1


def _check(edit: Editor, kept: Mapping[Axis, torch.Tensor]) -> None:
    """Refuse a program in which anything but a weight writes to the stream."""
    zero, known = edit.program.fact(zeros), edit.program.fact(axes)
    for total in edit.program.fact(structure).residuals:
        channels = kept.get(known.axis(total, -1))
        if channels is not None and not bool((zero_at(zero, total, -1) | channels).all()):
            raise UnsupportedError(
                f"prune-hidden cannot keep channels of {place(edit.program, total)} at zero: something that is no weight, "
                f"such as computed positions, writes to the residual stream"
            )


def _reconstruct(edit: Editor, dense: Program, kept: Mapping[Axis, torch.Tensor]) -> None:
    """Refit the layers that read the stream, in order, to their outputs in the dense program."""
    program_axes = edit.program.fact(axes)
    axis_of = {node: axis for axis in kept for node in _readers(edit.program, program_axes, axis)}
    chosen = edit.accepted((node, _refittable(node)) for node in axis_of)
    originals = {node.name: node for node in dense.nodes()}
    before_and_now = (
        sweep(dense, edit.data, [originals[node.name] for node in chosen]),
        sweep(edit.program, edit.data, [*chosen], dense),
    )
    for (_, wanted), (node, read) in zip(*before_and_now, strict=True):
        edit.current = node
        matrix, bias = chosen[node], _bias(node)
        before = matrix.read(dense).float()
        weight, shift = fit(before, wanted, read, kept[axis_of[node]].to(before.device), centred=bias is not None)
        # A layer that also writes to the stream keeps its zeros.
        silent = ~matrix.read(edit.program).any(1) & before.any(1)
        matrix.write(edit, weight.masked_fill(silent[:, None], 0))
        edit.rewritten -= 1
        if bias is not None:
            tensor = edit.tensor(bias)
            edit.set_weight(bias, (tensor + shift.masked_fill(silent, 0)).to(tensor.dtype))


def _refittable(node: fx.Node) -> Matrix | str:
    """The matrix of a layer, or why the layer is not refitted."""
    matrix = matrix_of(node)
    if isinstance(matrix, str):
        return f"it is not refitted: {matrix}"
    return matrix if len(readers_of(matrix.node)) == 1 else "it is not refitted: its weight is read elsewhere too"


def _bias(node: fx.Node) -> fx.Node | None:
    """The bias of a linear layer where it is a weight with no other reader."""
    items = [weight for weight in node.all_input_nodes if weight.op == "get_attr" and nodes.tensor_type(weight).rank == 1]
    return items[0] if len(items) == 1 and len(items[0].users) == 1 else None


def fit(
    weight: torch.Tensor, wanted: Sequence[torch.Tensor], read: Sequence[torch.Tensor], kept: torch.Tensor, *, centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """W̃ and b̃ − b, see the module docstring.

    Args:
        wanted: x of each sample, [tokens, features].
        read: x̃ of each sample, [tokens, features].
        kept: [features].
    """
    count = sum(map(len, read))
    if count <= centred:  # a mean of one row has no variance
        return weight.masked_fill(~kept, 0), torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
    means = torch.zeros(2, weight.shape[1], dtype=torch.float64, device=weight.device)
    if centred:
        for x, y in zip(wanted, read, strict=True):
            means += torch.stack([x.double().sum(0), y.double().sum(0)]) / count
    first, second = (_errors(weight.double(), wanted, read, kept, means, half) for half in range(2))
    damping = min(DAMPINGS, key=lambda damping: _left(first, second, damping) + _left(second, first, damping))
    change = _change(first[0] + second[0], first[1] + second[1], damping)
    fitted = torch.zeros_like(weight)
    fitted[:, kept] = (weight[:, kept].double() + change).to(weight.dtype)
    return fitted, (weight.double() @ means[0] - fitted.double() @ means[1]).to(weight.dtype)


def _errors(
    weight: torch.Tensor,
    wanted: Sequence[torch.Tensor],
    read: Sequence[torch.Tensor],
    kept: torch.Tensor,
    means: torch.Tensor,
    half: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the first or the second half of each sample's tokens, for the features that are kept.

    Returns:
        Σ W (x - x̃) x̃ᵀ, [outputs, kept]; Σ x̃ x̃ᵀ, [kept, kept]. x and x̃ are relative to their means.
    """
    features, left = weight.shape[1], int(kept.sum())
    cross, gram = (torch.zeros(size, left, dtype=torch.float64, device=weight.device) for size in (features, left))
    for x, y in zip(wanted, read, strict=True):
        rows = slice(len(x) // 2, None) if half else slice(len(x) // 2)
        x, y = x[rows].double() - means[0], (y[rows].double() - means[1])[:, kept]
        cross += x.T @ y
        gram += y.T @ y
    return weight @ cross - weight[:, kept] @ gram, gram


def _change(missing: torch.Tensor, gram: torch.Tensor, damping: float) -> torch.Tensor:
    """W̃ - W, from sums as `_errors` returns them."""
    ridge = gram.clone()
    ridge.diagonal().add_((damping * gram.diagonal().mean()).clamp_min(1e-12))
    return torch.cholesky_solve(missing.T, torch.linalg.cholesky(ridge)).T


def _left(fitted: tuple[torch.Tensor, torch.Tensor], others: tuple[torch.Tensor, torch.Tensor], damping: float) -> float:
    """The squared error on other tokens than those of the fit, up to a constant."""
    change = _change(*fitted, damping)
    return float((change * (change @ others[1] - 2 * others[0])).sum())
