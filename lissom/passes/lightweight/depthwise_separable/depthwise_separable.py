"""Factor a convolution into a depthwise one, which convolves each channel, and a pointwise one, which mixes channels.

K: [channels out, channels in / groups, *sizes] is a kernel, t its sizes flattened. With r terms it becomes one of

    depthwise first:  K[o, i, t] ≈ Σ_ρ P[o, i, ρ] · D[i, ρ, t],  r·in·(t + out/groups) elements
    pointwise first:  K[o, i, t] ≈ Σ_ρ D[o, ρ, t] · P[o, ρ, i],  r·out·(t + in/groups) elements

by a truncated singular value decomposition of the kernel's slice of each input channel [out, t], or of each output channel
[t, in]; no other factors with r terms have a smaller Frobenius error. The depthwise one keeps stride, padding and dilation, the
pointwise one the groups, and the last one the bias. With r = 1 and depthwise first it is the layer of Howard et al. 2017,
MobileNets, §3.1, https://arxiv.org/abs/1704.04861; obtaining it by a decomposition is from Guo et al. 2018, Network Decoupling:
From Regular to Depthwise Separable Convolutions, https://arxiv.org/abs/1808.05517.

A layer is left alone unless both its bytes and its FLOPs decrease. With few input channels, as in the patch embedding of an RGB
image, terms are cheap but each keeps little energy; with few output channels, or a kernel with few taps, one term may cost more
than the whole layer.

With calibration data the slices are multiplied by the root of the covariance of their inputs (the taps of a channel, or the
channels of a group) before the decomposition, which minimizes the output error instead of the kernel error. The kernel applied
last is then refitted to the layer's original output on its current input by least squares: min ‖ZW - Y‖² + λ‖W - W₀‖², with W₀
from the decomposition. λ minimizes the error of a fit to half of the samples on the other half; W₀ stays where no λ beats it,
or ZᵀZ would be too large. Layers are factored in the order in which they run. Padding in a batch counts, because it is
convolved with its neighbours.

One of `rank`, `keep` and `budget` sets the number of terms, and `amounts` that of single convolutions: a number as `rank`, a
fraction as `budget`. With `order=auto` both orders are tried. Under `rank`, pointwise first gets as many terms as cost no more
bytes and FLOPs than depthwise first, and the order with the smaller error is taken; under `budget` both get as many terms as
it allows; under `keep` the order with fewer bytes is taken. Fewer FLOPs are not always less time: on CPUs depthwise
convolutions reach a small fraction of the speed of full ones, above all pointwise first, where they read more channels.
`order=depthwise-first` with few terms gives the largest speedup, and wide kernels gain more than narrow ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx, nn

from lissom.compiler.analysis.amounts import UNCHANGED, Amounts, AmountSite, amounts_text, fraction_of, is_count, site_names
from lissom.compiler.analysis.module_filter import obstacle_by_name
from lissom.compiler.calibration.partial_run import Stream
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.interpreter import evaluate_nodes
from lissom.compiler.ir.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.memory import give_back_memory
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.compiler.pipeline.spelling import format_pass
from lissom.compiler.transforms.factor_budget import check_amount
from lissom.passes.lightweight.depthwise_separable.convolution import Convolution, convolution_of
from lissom.passes.lightweight.depthwise_separable.factors import (
    ORDERS,
    Fit,
    Layout,
    covariance,
    decompose,
    energy,
    factors,
    of_slices,
    roots,
)

_ROUNDING = 1e-9
"""Tolerance on the fraction of energy kept, for float64 rounding."""


@dataclass(frozen=True)
class DepthwiseSeparable(Approximation):
    """Replaces convolutions by depthwise and pointwise ones where these take fewer bytes and FLOPs.

    Attributes:
        rank: number of terms per slice of a kernel, 1 or more.
        keep: fraction of a kernel's energy to keep, above 0 and up to 1; of the output energy with calibration data.
        budget: fraction of its bytes and FLOPs that a layer may take, above 0 and below 1.
        amounts: terms of single convolutions, or fractions of their bytes and FLOPs, by module path, with `*` and `?`:
            `"features.0=2,features.3=0.5"`. Without rank, keep and budget, other convolutions stay as they are.
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
    amounts: str = ""

    def __post_init__(self) -> None:
        self._amounts()
        check_amount("depthwise-separable", rank=self.rank, keep=self.keep, budget=self.budget, amounts=self.amounts)

    def _amounts(self) -> Amounts:
        return Amounts.parse(self.amounts, "depthwise-separable{amounts=}", is_count)

    @classmethod
    def sites(cls, program: Program) -> Sequence[AmountSite]:
        return _sites(cls(rank=1)._layers(Editor(program, cls.name())))

    def run(self, edit: Editor) -> None:
        items = self._items(edit, self._layers(edit))
        before = edit.program.copy()
        separations: dict[Convolution, Separation] = {}
        with kept_state(edit.program):
            now, then = Stream(edit.program, edit.data), Stream(before, edit.data)
            originals = dict(zip(edit.program.graph.nodes, before.graph.nodes, strict=True))
            for finished, layer in enumerate(items):
                edit.current = layer.node
                separation = items[layer]._separate(
                    Calibration(layer, originals[layer.node], now, then, range(len(edit.data))), edit.program
                )
                if isinstance(separation, str):
                    edit.skip(layer.node, separation)
                    continue
                separations[layer] = separation
                kernel = separation.layout.kernel(separation.first, separation.last)
                edit.set_weight(layer.kernel, kernel.to(nodes.tensor_type(layer.kernel).dtype))
                give_back_memory()
                edit.report("layers", finished + 1, len(items))
        self._tell(edit, separations)
        for layer, separation in separations.items():
            trainable = isinstance(before.weight(str(layer.kernel.target)), nn.Parameter)
            _put(edit, layer, separation, trainable=trainable)

    def _items(self, edit: Editor, layers: Sequence[Convolution]) -> dict[Convolution, DepthwiseSeparable]:
        """Each convolution to factor, with a pass that has its amount."""
        items: dict[Convolution, DepthwiseSeparable] = {}
        sites, by_name_only = _sites(layers), self.rank is None and self.keep is None and self.budget is None
        for layer, site, amount in zip(layers, sites, self._amounts().at(sites, "convolutions"), strict=True):
            if amount == UNCHANGED or (amount is None and by_name_only):
                edit.skip(layer.node, "amounts= leaves it as it is" if amount else "amounts= does not name it")
            elif amount is None:
                items[layer] = self
            elif (fraction := fraction_of(amount)) is not None:
                items[layer] = replace(self, rank=None, keep=None, budget=fraction, amounts="")
            else:
                count = self._amounts().count(site, amount)
                items[layer] = replace(self, rank=count, keep=None, budget=None, amounts="")
        return items

    def _tell(self, edit: Editor, separations: Mapping[Convolution, Separation]) -> None:
        """Record the pass with the terms of each convolution, where all have one order: terms of another order differ."""
        orders = {separation.layout.order for separation in separations.values()}
        if len(orders) == 1:
            text = amounts_text(_sites([*separations]), [separation.cost.terms for separation in separations.values()])
            per_site = replace(self, rank=None, keep=None, budget=None, amounts=text, order=orders.pop(), skip="", only="")
            edit.per_site = format_pass(per_site)

    def _layers(self, edit: Editor) -> list[Convolution]:
        """The convolutions to factor; the others are reported as skipped."""

        def read(node: fx.Node) -> Convolution | str:
            if reason := obstacle_by_name(node, skip=self.skip, only=self.only):
                return reason
            if node.target in TRANSPOSED_CONVOLUTIONS:
                return "it is a transposed convolution"
            layer = convolution_of(node)
            return layer if isinstance(layer, str) else _obstacle(edit.program, layer) or layer

        layers = edit.accepted((node, read(node)) for node in edit.nodes(*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS))
        return list(layers.values())

    def _separate(self, calibration: Calibration, program: Program) -> Separation | str:
        """The factors of a layer, or why it is left alone."""
        layer = calibration.layer
        kernel = program.weight(str(layer.kernel.target)).detach()
        sizes = layer.channels_in, layer.channels_out, layer.groups, layer.window
        layouts = [Layout(order, *sizes) for order in ORDERS if self.order in ("auto", order)]
        covariances = calibration.covariances(layouts)
        slices = [Slices.of(layout, kernel, known) for layout, known in zip(layouts, covariances, strict=True)]
        plans = self._plans(layer, slices)
        if isinstance(plans, str):
            return plans
        results = calibration.fit([candidate.separate(cost) for candidate, cost in plans])
        if self.keep is not None:
            return min(results, key=lambda separation: (separation.cost.numbers, separation.error))
        return min(results, key=lambda separation: separation.error)

    def _plans(self, layer: Convolution, slices: Sequence[Slices]) -> list[tuple[Slices, Cost]] | str:
        """The number of terms for each order that saves bytes and FLOPs, or why none does."""
        whole = _whole(layer)
        plans: list[tuple[Slices, Cost]] = []
        reasons: list[str] = []
        limit: Cost | None = None
        for candidate in slices:
            term_cost = _cost(candidate.layout, layer)
            cost = term_cost.times(min(self._terms(candidate, term_cost, whole, limit), candidate.layout.most_terms))
            limit = limit or cost
            if cost.terms and cost.below(whole):
                plans.append((candidate, cost))
            elif cost.terms:
                reasons.append(f"{_terms(cost)} {cost.share(whole)}; both must be less")
            else:
                most = "what the other order takes" if self.budget is None else f"budget={self.budget:g}"
                reasons.append(f"one term {term_cost.share(whole)}, over {most}")
        return plans or reasons[0]

    def _terms(self, slices: Slices, term_cost: Cost, whole: Cost, limit: Cost | None) -> int:
        """The number of terms of a layer in one order.

        Args:
            limit: the cost of the other order, where it is known.
        """
        if self.keep is not None:
            return int((energy(slices.S) < self.keep - _ROUNDING).sum()) + 1
        if self.budget is not None:
            return int(self.budget * min(whole.numbers / term_cost.numbers, whole.products / term_cost.products))
        assert self.rank is not None
        if limit is None or not limit.below(whole):
            return self.rank
        return min(limit.numbers // term_cost.numbers, limit.products // term_cost.products)


@dataclass(frozen=True)
class Cost:
    """The cost of a layer: its number of weights, and its multiplications at the captured sizes."""

    numbers: int
    products: int
    terms: int = 0

    def times(self, terms: int) -> Cost:
        return Cost(self.numbers * terms, self.products * terms, terms)

    def below(self, other: Cost) -> bool:
        return self.numbers < other.numbers and self.products < other.products

    def share(self, whole: Cost) -> str:
        """The text `takes 50% of its bytes and 60% of its operations`, with `take` for several terms."""
        takes = "take" if self.terms > 1 else "takes"
        bytes_share, products_share = self.numbers / whole.numbers, self.products / whole.products
        return f"{takes} {bytes_share:.0%} of its bytes and {products_share:.0%} of its operations"


@dataclass(frozen=True)
class Separation:
    """Both kernels of a layer, and the relative error: of the output where there is data, else of the kernel."""

    layout: Layout
    cost: Cost
    first: torch.Tensor
    last: torch.Tensor
    error: float


@dataclass(frozen=True)
class Slices:
    """The decomposition of a kernel's slices, and the inverse of the root they were multiplied with."""

    layout: Layout
    U: torch.Tensor
    S: torch.Tensor
    Vt: torch.Tensor
    inverse: torch.Tensor | None

    @staticmethod
    def of(layout: Layout, kernel: torch.Tensor, known: torch.Tensor | None) -> Slices:
        if known is None:
            return Slices(layout, *decompose(layout.slices(kernel)), None)
        root, inverse = (of_slices(layout, factor) for factor in roots(known))
        return Slices(layout, *decompose(layout.slices(kernel), root), inverse)

    def separate(self, cost: Cost) -> Separation:
        first, last = factors((self.U, self.S, self.Vt), cost.terms, self.inverse)
        missing = float((1 - energy(self.S)[cost.terms - 1]).clamp_min(0)) ** 0.5
        return Separation(self.layout, cost, *self.layout.weights(first, last), missing)


@dataclass(frozen=True)
class Calibration:
    """A layer's current inputs, and its outputs before this pass, per sample; empty without calibration data."""

    layer: Convolution
    original: fx.Node
    now: Stream
    then: Stream
    samples: range

    def covariances(self, layouts: Sequence[Layout]) -> list[torch.Tensor | None]:
        """The covariances of the slices' inputs for each layout."""
        sums: list[torch.Tensor | None] = [None for _ in layouts]
        for index in self.samples:
            self.now.advance(index, self.layer.input)
            for value in self._read(index).split(1):
                parts = [covariance(layout, value) for layout in layouts]
                sums = [part if total is None else total + part for total, part in zip(sums, parts, strict=True)]
        return sums

    def fit(self, results: Sequence[Separation]) -> list[Separation]:
        """These results with the last kernel refitted to the layer's original outputs."""
        fits = [Fit(separation.layout, separation.first, separation.last) for separation in results]
        read = nodes.operand(self.original)
        bias = None if self.layer.bias is None else evaluate_nodes(self.now.program.graph_module, self.layer.bias)
        seen = 0
        for index in self.samples:
            # Stopped before the layer, as the other run was, so that both have its input in the same precision.
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
        return [replace(separation, last=last, error=error) for separation, (last, error) in zip(results, solved, strict=True)]

    def _read(self, index: int) -> torch.Tensor:
        """[batch, channels in, *sizes]."""
        (value,) = self.now.peek(index, [self.layer.input])
        return self._batched(value)

    def _batched(self, value: torch.Tensor) -> torch.Tensor:
        """The value with a batch dimension; a convolution also takes one sample without a batch."""
        return value if value.dim() == len(self.layer.window.size) + 2 else value[None]


def _sites(layers: Sequence[Convolution]) -> list[AmountSite]:
    """The convolutions as amounts name them; each takes terms up to those that equal its kernel."""
    paths = [nodes.origin(layer.node).module_path for layer in layers]
    sites: list[AmountSite] = []
    for layer, name in zip(layers, site_names(paths, [str(layer.kernel.target) for layer in layers]), strict=True):
        sizes = layer.channels_in, layer.channels_out, layer.groups, layer.window
        most = max(Layout(order, *sizes).most_terms for order in ORDERS)
        sites.append(AmountSite("convolution", (name,), most, {DepthwiseSeparable.name(): range(1, most + 1)}))
    return sites


def _whole(layer: Convolution) -> Cost:
    numbers = layer.channels_out * layer.channels_in // layer.groups * layer.window.taps
    return Cost(numbers, numbers * layer.places_out)


def _cost(layout: Layout, layer: Convolution) -> Cost:
    """The cost of one term."""
    if layout.order == "depthwise-first":
        numbers = layout.channels_in * (layout.window.taps + layout.outputs)
        return Cost(numbers, numbers * layer.places_out, 1)
    pointwise, depthwise = layout.channels_out * layout.inputs, layout.channels_out * layout.window.taps
    return Cost(pointwise + depthwise, pointwise * layer.places_in + depthwise * layer.places_out, 1)


def _terms(cost: Cost) -> str:
    return f"{cost.terms} terms" if cost.terms > 1 else "1 term"


def _obstacle(program: Program, layer: Convolution) -> str | None:
    """The reason a layer's kernel cannot be factored for this layer only, or need not be; None if it can."""
    if layer.window.taps == 1:
        return "its kernel has one element per channel, so it is pointwise already"
    if layer.channels_in == layer.groups > 1:
        return "it is depthwise already"
    reads = [user for node in program if node.op == "get_attr" and node.target == layer.kernel.target for user in node.users]
    if len(reads) > 1:
        return "its kernel is read elsewhere too"
    if not nodes.tensor_type(layer.kernel).dtype.is_floating_point or str(layer.kernel.target) in program.state:
        return "its kernel is no floating-point weight"
    return None


def _put(edit: Editor, layer: Convolution, separation: Separation, *, trainable: bool) -> None:
    """Replace a layer by both convolutions, and note their cost and error."""
    node, layout = layer.node, separation.layout
    depthwise_first = layout.order == "depthwise-first"
    names = ("depthwise", "pointwise") if depthwise_first else ("pointwise", "depthwise")
    dtype = nodes.tensor_type(layer.kernel).dtype
    rank, padding = len(layer.window.size), nodes.argument(node, "padding")
    over = nodes.overload(node), [*layer.window.stride], padding, [*layer.window.dilation]
    places = CONVOLUTIONS[rank - 1], [1] * rank, [0] * rank, [1] * rank
    (target, *window), (last_target, *last_window) = (over, places) if depthwise_first else (places, over)
    edit.current = node
    with edit.before(node):
        factors = (factor.to(dtype).contiguous() for factor in (separation.first, separation.last))
        first, last = (
            edit.weight(f"{layer.kernel.target}_{name}", nn.Parameter(factor, requires_grad=False) if trainable else factor)
            for name, factor in zip(names, factors, strict=True)
        )
        value = edit.call(target, layer.input, first, None, *window, layout.first_groups)
        edit.replace(node, edit.call(last_target, value, last, nodes.argument(node, "bias"), *last_window, layout.last_groups))
    edit.note(
        f"{nodes.origin(value).module_path or node.name}: {layout.order}, {_terms(separation.cost)}, "
        f"{separation.cost.share(_whole(layer)).removeprefix('takes ').removeprefix('take ')}; "
        f"relative {'output' if edit.data else 'kernel'} error {separation.error:.2g}"
    )
