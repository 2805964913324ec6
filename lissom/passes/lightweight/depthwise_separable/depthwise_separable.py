"""Convolutions become a depthwise and a pointwise one: each channel convolved by itself, and places by themselves mixed.

K: [channels out, channels in / groups, *sizes] is a kernel, t its sizes flattened. With r terms it becomes one of

    depthwise first:  K[o, i, t] ≈ Σ_ρ P[o, i, ρ] · D[i, ρ, t],  r·in·(t + out/groups) numbers
    pointwise first:  K[o, i, t] ≈ Σ_ρ D[o, ρ, t] · P[o, ρ, i],  r·out·(t + in/groups) numbers

by a truncated singular value decomposition of the kernel's slice of each input channel [out, t], or of each output channel
[t, in]; no other factors with r terms have a smaller Frobenius error. The depthwise one keeps stride, padding and dilation, the
pointwise one the groups, and the last one the bias. With r = 1 and depthwise first it is the layer of Howard et al. 2017,
MobileNets, §3.1, https://arxiv.org/abs/1704.04861; finding it by a decomposition is from Guo et al. 2018, Network Decoupling:
From Regular to Depthwise Separable Convolutions, https://arxiv.org/abs/1808.05517.

A layer is left alone unless both its bytes and its operations become fewer. In one that few channels come into, such as an
embedding of the patches of a picture in three colours, terms are cheap but hold little each; where few channels go out, or the
kernel has few places, one term may cost more than all of it.

With calibration data the decomposition is that of slices times the root of the covariance of what they meet, the taps of a
channel or the channels of a group, so that what is left out is what shows least. The kernel applied last is then fitted to what
the layer gave before, on what it reads now, by least squares: min ‖ZW - Y‖² + λ‖W - W₀‖², W₀ the one found first. λ is the one
with which a fit to half of the samples errs least on the other half; where none errs less than W₀, or ZᵀZ would be too large,
W₀ stays. Layers are treated in the order in which they run. Padding of a batch counts, as it is convolved with what lies beside
it.

How many terms is told by exactly one of `rank`, `keep` and `budget`. With `order=auto` both orders are tried: under `rank`
pointwise first has as many terms as cost no more bytes and operations than depthwise first has, and the one that errs less is
taken; under `budget` both have as many as it allows; under `keep` the one that takes fewer bytes. Fewer operations are not
always less time: on CPUs depthwise convolutions reach a small part of the speed that full ones do, above all pointwise first,
where they read more channels. `order=depthwise-first` with few terms is what gains most time; wide kernels gain more than
narrow ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import fx, nn

from lissom.compiler.analysis.module_filter import obstacle_by_name
from lissom.compiler.calibration.partial_run import Stream
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.interpreter import evaluate_nodes
from lissom.compiler.ir.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.memory import give_back_memory
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.compiler.transforms.factor_budget import check_amount
from lissom.passes.lightweight.depthwise_separable.convolution import Convolution, convolution_of
from lissom.passes.lightweight.depthwise_separable.factors import (
    ORDERS,
    Fit,
    Layout,
    Order,
    covariance,
    decompose,
    energy,
    factors,
    of_slices,
    roots,
)

aten = torch.ops.aten

_POINTWISE = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_ROUNDING = 1e-9
"""Of a share of energy that is all of it, but for rounding in float64."""


@dataclass(frozen=True)
class DepthwiseSeparable(Approximation):
    """Replaces convolutions by depthwise and pointwise ones where these take fewer bytes and FLOPs.

    rank: number of terms per slice of a kernel, 1 or more.
    keep: fraction of a kernel's energy to keep, above 0 and up to 1; of the output energy with calibration data.
    budget: fraction of its bytes and FLOPs that a layer may take, above 0 and below 1.
    order: which convolution comes first; see above for `auto`.
    skip: module paths to leave as they are, with `*` and `?`, separated by commas: `"encoder.layer.0,*.11"`.
    only: module paths to change, in the same form; others stay as they are.
    """

    rank: int | None = None
    keep: float | None = None
    budget: float | None = None
    order: Literal["auto", "depthwise-first", "pointwise-first"] = "auto"
    skip: str = ""
    only: str = ""

    def __post_init__(self) -> None:
        check_amount("depthwise-separable", rank=self.rank, keep=self.keep, budget=self.budget)

    def run(self, edit: Editor) -> None:
        layers = self._layers(edit)
        before = edit.program.copy()
        found: dict[Convolution, Separation] = {}
        with kept_state(edit.program):
            now, then = Stream(edit.program, edit.data), Stream(before, edit.data)
            originals = dict(zip(edit.program.graph.nodes, before.graph.nodes, strict=True))
            for finished, layer in enumerate(layers):
                edit.current = layer.node
                result = self._separate(
                    Calibration(layer, originals[layer.node], now, then, range(len(edit.data))), edit.program
                )
                if isinstance(result, str):
                    edit.skip(layer.node, result)
                    continue
                found[layer] = result
                kernel = result.layout.kernel(result.first, result.last)
                edit.set_weight(layer.kernel, kernel.to(nodes.tensor_type(layer.kernel).dtype))
                give_back_memory()
                edit.report("layers", finished + 1, len(layers))
        for layer, result in found.items():
            trainable = isinstance(before.weight(str(layer.kernel.target)), nn.Parameter)
            _put(edit, layer, result, trainable=trainable)

    def _layers(self, edit: Editor) -> list[Convolution]:
        """The convolutions to treat; the others are reported."""
        layers: list[Convolution] = []
        for node in edit.nodes(*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS):
            layer = self._obstacle_to_reading(node) or convolution_of(node)
            if isinstance(layer, Convolution):
                layer = _obstacle(edit.program, layer) or layer
            if isinstance(layer, Convolution):
                layers.append(layer)
            else:
                edit.skip(node, layer)
        return layers

    def _obstacle_to_reading(self, node: fx.Node) -> str | None:
        reason = obstacle_by_name(node, skip=self.skip, only=self.only)
        if reason is None and node.target in TRANSPOSED_CONVOLUTIONS:
            return "it is a transposed convolution"
        return reason

    def _separate(self, calibration: Calibration, program: Program) -> Separation | str:
        """The factors of a layer, or why it is left alone."""
        layer = calibration.layer
        kernel = program.weight(str(layer.kernel.target)).detach()
        layouts = [_layout(layer, order) for order in ORDERS if self.order in ("auto", order)]
        covariances = calibration.covariances(layouts)
        slices = [Slices.of(layout, kernel, known) for layout, known in zip(layouts, covariances, strict=True)]
        plans = self._plans(layer, slices)
        if isinstance(plans, str):
            return plans
        results = calibration.fit([item.separate(cost) for item, cost in plans])
        if self.keep is not None:
            return min(results, key=lambda result: (result.cost.numbers, result.error))
        return min(results, key=lambda result: result.error)

    def _plans(self, layer: Convolution, slices: Sequence[Slices]) -> list[tuple[Slices, Cost]] | str:
        """The terms for each order that saves bytes and operations, or why none does."""
        whole = _whole(layer)
        plans: list[tuple[Slices, Cost]] = []
        reasons: list[str] = []
        limit: Cost | None = None
        for item in slices:
            one = _cost(item.layout, layer, 1)
            cost = one.times(min(self._terms(item, one, whole, limit), item.layout.most_terms))
            limit = limit or cost
            if cost.terms and cost.below(whole):
                plans.append((item, cost))
            elif cost.terms:
                reasons.append(f"{_terms(cost)} {cost.share(whole)}; both must be less")
            else:
                most = "what the other order takes" if self.budget is None else f"budget={self.budget:g}"
                reasons.append(f"one term {one.share(whole)}, over {most}")
        return plans or reasons[0]

    def _terms(self, slices: Slices, one: Cost, whole: Cost, limit: Cost | None) -> int:
        """How many terms a layer gets in one order. limit: the cost of the other order, where that is known."""
        if self.keep is not None:
            return int((energy(slices.S) < self.keep - _ROUNDING).sum()) + 1
        if self.budget is not None:
            return int(self.budget * min(whole.numbers / one.numbers, whole.products / one.products))
        rank = cast(int, self.rank)
        if limit is None or not limit.below(whole):
            return rank
        return min(limit.numbers // one.numbers, limit.products // one.products)


@dataclass(frozen=True)
class Cost:
    """What a layer takes: the numbers it holds, and the products it computes at the captured sizes."""

    numbers: int
    products: int
    terms: int = 0

    def times(self, terms: int) -> Cost:
        return Cost(self.numbers * terms, self.products * terms, terms)

    def below(self, other: Cost) -> bool:
        return self.numbers < other.numbers and self.products < other.products

    def share(self, whole: Cost) -> str:
        """`takes 50% of its bytes and 60% of its operations`, in the number of the terms."""
        takes = "take" if self.terms > 1 else "takes"
        bytes_share, products_share = self.numbers / whole.numbers, self.products / whole.products
        return f"{takes} {bytes_share:.0%} of its bytes and {products_share:.0%} of its operations"


@dataclass(frozen=True)
class Separation:
    """Both kernels of a layer, and its relative error: of what it gives where there are data, else of its kernel."""

    layout: Layout
    cost: Cost
    first: torch.Tensor
    last: torch.Tensor
    error: float


@dataclass(frozen=True)
class Slices:
    """The decomposition of a kernel's slices, and the inverse of what they were multiplied with before it."""

    layout: Layout
    U: torch.Tensor
    S: torch.Tensor
    Vt: torch.Tensor
    inverse: torch.Tensor | None

    @staticmethod
    def of(layout: Layout, kernel: torch.Tensor, known: torch.Tensor | None) -> Slices:
        if known is None:
            return Slices(layout, *decompose(layout.slices(kernel)), None)
        root, inverse = (of_slices(layout, item) for item in roots(known))
        return Slices(layout, *decompose(layout.slices(kernel), root), inverse)

    def separate(self, cost: Cost) -> Separation:
        first, last = factors((self.U, self.S, self.Vt), cost.terms, self.inverse)
        missing = float((1 - energy(self.S)[cost.terms - 1]).clamp_min(0)) ** 0.5
        return Separation(self.layout, cost, *self.layout.weights(first, last), missing)


@dataclass(frozen=True)
class Calibration:
    """What a layer reads now, and gave before this pass, for each of the samples; nothing where there are none."""

    layer: Convolution
    original: fx.Node
    now: Stream
    then: Stream
    samples: range

    def covariances(self, layouts: Sequence[Layout]) -> list[torch.Tensor | None]:
        """Of what the slices of each layout meet."""
        sums: list[torch.Tensor | None] = [None for _ in layouts]
        for index in self.samples:
            self.now.advance(index, self.layer.input)
            for value in self._read(index).split(1):
                parts = [covariance(layout, value) for layout in layouts]
                sums = [part if total is None else total + part for total, part in zip(sums, parts, strict=True)]
        return sums

    def fit(self, results: Sequence[Separation]) -> list[Separation]:
        """Each with its last kernel fitted to what the layer gave."""
        fits = [Fit(result.layout, result.first, result.last) for result in results]
        read = cast(fx.Node, self.original.args[0])
        bias = None if self.layer.bias is None else evaluate_nodes(self.now.program.graph_module, self.layer.bias)
        seen = 0
        for index in self.samples:
            # Halted before the layer, as the other stream was, so that both hold its input in the same precision.
            self.then.advance(index, read)
            (given,) = self.then.peek(index, [self.original])
            if bias is not None:
                given = given - bias.reshape(-1, *[1] * len(self.layer.window.size))
            rows = list(zip(self._read(index).split(1), self._batched(given).split(1), strict=True))
            for value, target in rows:
                half = None if len(rows) == len(self.samples) == 1 else seen % 2
                seen += 1
                for fit in fits:
                    fit.add(value, target, half)
        if not self.samples:
            return list(results)
        solved = [fit.solve() for fit in fits]
        return [replace(result, last=last, error=error) for result, (last, error) in zip(results, solved, strict=True)]

    def _read(self, index: int) -> torch.Tensor:
        """[batch, channels in, *sizes]."""
        (value,) = self.now.peek(index, [self.layer.input])
        return self._batched(value)

    def _batched(self, value: torch.Tensor) -> torch.Tensor:
        """A convolution takes one sample without a batch too."""
        return value if value.dim() == len(self.layer.window.size) + 2 else value[None]


def _layout(layer: Convolution, order: Order) -> Layout:
    return Layout(order, layer.channels_in, layer.channels_out, layer.groups, layer.window)


def _whole(layer: Convolution) -> Cost:
    numbers = layer.channels_out * layer.channels_in // layer.groups * layer.window.taps
    return Cost(numbers, numbers * layer.places_out)


def _cost(layout: Layout, layer: Convolution, terms: int) -> Cost:
    pointwise = layout.channels_in * layout.outputs
    if layout.order == "depthwise-first":
        numbers = layout.channels_in * layout.window.taps + pointwise
        return Cost(numbers, numbers * layer.places_out).times(terms)
    pointwise, depthwise = layout.channels_out * layout.inputs, layout.channels_out * layout.window.taps
    return Cost(pointwise + depthwise, pointwise * layer.places_in + depthwise * layer.places_out).times(terms)


def _terms(cost: Cost) -> str:
    return f"{cost.terms} terms" if cost.terms > 1 else "1 term"


def _obstacle(program: Program, layer: Convolution) -> str | None:
    """Why a layer's kernel cannot be factored for it alone, or need not be."""
    if layer.window.taps == 1:
        return "its kernel is of one place, so that it is pointwise already"
    if layer.channels_in == layer.groups > 1:
        return "it is depthwise already"
    reads = [user for node in program if node.op == "get_attr" and node.target == layer.kernel.target for user in node.users]
    if len(reads) > 1:
        return "its kernel is read elsewhere too"
    if not nodes.tensor_type(layer.kernel).dtype.is_floating_point or str(layer.kernel.target) in program.state:
        return "its kernel is no weight of floating-point numbers"
    return None


def _put(edit: Editor, layer: Convolution, found: Separation, *, trainable: bool) -> None:
    """Put both convolutions in the place of a layer, and say what they take and how much they err."""
    node, layout = layer.node, found.layout
    depthwise_first = layout.order == "depthwise-first"
    names = ("depthwise", "pointwise") if depthwise_first else ("pointwise", "depthwise")
    dtype = nodes.tensor_type(layer.kernel).dtype
    rank, padding = len(layer.window.size), nodes.argument(node, "padding")
    over = cast(torch._ops.OpOverload, node.target), [*layer.window.stride], padding, [*layer.window.dilation]
    places = _POINTWISE[rank], [1] * rank, [0] * rank, [1] * rank
    (target, *window), (last_target, *last_window) = (over, places) if depthwise_first else (places, over)
    edit.current = node
    with edit.before(node):
        factors = (factor.to(dtype).contiguous() for factor in (found.first, found.last))
        first, last = (
            edit.weight(f"{layer.kernel.target}_{name}", nn.Parameter(factor, requires_grad=False) if trainable else factor)
            for name, factor in zip(names, factors, strict=True)
        )
        value = edit.call(target, layer.input, first, None, *window, layout.first_groups)
        edit.replace(node, edit.call(last_target, value, last, nodes.argument(node, "bias"), *last_window, layout.last_groups))
    edit.note(
        f"{nodes.origin(value).module_path or node.name}: {layout.order}, {_terms(found.cost)}, "
        f"{found.cost.share(_whole(layer)).removeprefix('takes ').removeprefix('take ')}; "
        f"{'output' if edit.data else 'kernel'} errs by {found.error:.2g} relative"
    )
