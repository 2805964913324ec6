"""Plots of a report: the roofline, latency against length, quality against work, and the curves of training passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lissom.compiler.pipeline.history import History, Step
from lissom.errors import UnsupportedError, nearest
from lissom.inspect.hot_layers import LayerTimes
from lissom.inspect.pictures import FAINT, MAIN, MARKED, QUIET, new_figure, save_figure
from lissom.measure.machine import Ceilings
from lissom.measure.timing import Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Facts:
    """The data of plots.

    Attributes:
        times: of layers, None before they are measured.
        lengths: the time of a call by its length.
    """

    title: str
    history: History
    times: LayerTimes | None = None
    lengths: Mapping[int, Timing] = field(default_factory=dict[int, Timing])


def plot(kind: str, facts: Facts, path: Path) -> None:
    """Draw one kind of plot. Raises UnsupportedError, see `Report.plot`."""
    if kind not in KINDS:
        hint = nearest(kind, KINDS) or ";"
        raise UnsupportedError(f"a report has no plot '{kind}'{hint} it has {', '.join(KINDS)}")
    save_figure(KINDS[kind](facts), path)


def _training(facts: Facts) -> Figure:
    """The loss of the steps and that of the data held out over minutes, a panel for each training pass."""
    trained = [step for step in facts.history.steps if step.curve]
    if not trained:
        raise UnsupportedError("no training pass ran, so there is no curve to draw; add `distill` or `finetune` to the passes")
    figure, panels = new_figure(len(trained))
    for axes, step in zip(panels, trained, strict=True):
        losses = [(point.seconds / 60, point.loss) for point in step.curve if point.loss is not None]
        axes.plot([at for at, _ in losses], [loss for _, loss in losses], label="steps", color=FAINT)
        axes.plot([point.seconds / 60 for point in step.curve], [point.held_out for point in step.curve], label="held out")
        axes.set(title=step.spelling, xlabel="minutes", ylabel="loss", yscale="log")
        axes.legend()
    return figure


def _roofline(facts: Facts) -> Figure:
    """The rate of every hot layer over its operations per byte, below the ceilings of the machine."""
    if facts.times is None:
        raise UnsupportedError("no layers were timed, so there is no roofline to draw; call report.kernels() first")
    times = facts.times
    if times.ceilings is None:
        raise UnsupportedError(f"there is no roofline to draw: {times.without_roof}")
    hot = [layer for layer in times.hot if layer.flops and layer.moved_bytes and layer.milliseconds]
    if not hot:
        raise UnsupportedError(
            f"no hot layer of {times.title} has a known number of operations, so there is no roofline to draw"
        )
    figure, (axes,) = new_figure()
    points = [(layer.flops / layer.moved_bytes, layer.flops / layer.milliseconds / 1e6) for layer in hot]
    _ceilings(axes, times.ceilings, [at for at, _ in points])
    for number, (layer, (intensity, rate)) in enumerate(zip(hot, points, strict=True), 1):
        pattern = layer.pattern or "the model itself"
        label = f"{number}: {pattern} ×{layer.count}, {layer.kernel.operator}, {layer.milliseconds:.3g} ms"
        axes.plot([intensity], [rate], "o", color=f"C{number - 1}", label=label, zorder=4)
        axes.annotate(str(number), (intensity, rate), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
    axes.set_title(times.title, fontsize=10)
    figure.legend(loc="outside lower left", fontsize=7, frameon=False)
    figure.set_size_inches(6.4, 4.2 + 0.15 * len(hot))
    return figure


def _ceilings(axes: Axes, ceilings: Ceilings, at: Sequence[float]) -> None:
    """The line of the memory bandwidth, and those of the products in each dtype."""
    bandwidth = ceilings.memory_gb_per_second.median
    peaks = {"fp32": ceilings.fp32_gflops, "bf16": ceilings.bf16_gflops, "int8": ceilings.int8_gops}
    known = [*at, *(peak.median / bandwidth for peak in peaks.values() if peak is not None)]
    low, high = min(known) / 4, max(known) * 4
    for dtype, peak in peaks.items():
        if peak is not None:
            knee = peak.median / bandwidth
            axes.plot([low, knee, high], [low * bandwidth, peak.median, peak.median], color=QUIET, linewidth=1)
            axes.annotate(f"{dtype} {peak.median:.0f}", (high, peak.median), ha="right", va="bottom", fontsize=8, color=QUIET)
    axes.annotate(f"{bandwidth:.3g} GB/s", (low, low * bandwidth), ha="left", va="bottom", fontsize=8, color=QUIET)


def _latency(facts: Facts) -> Figure:
    """The median time of a call and its quartiles over the length."""
    if len(facts.lengths) < 2:
        raise UnsupportedError("no lengths were timed, so there is no latency to draw; call report.latency() first")
    figure, (axes,) = new_figure()
    lengths, timings = [*facts.lengths], [*facts.lengths.values()]
    axes.fill_between(
        lengths, [timing.low_ms for timing in timings], [timing.high_ms for timing in timings], color=MAIN, alpha=0.2
    )
    axes.plot(lengths, [timing.median_ms for timing in timings], "o-", color=MAIN, label="median, and middle half of the runs")
    axes.set(title=facts.title, xlabel="length", ylabel="ms a call", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.legend()
    return figure


def _quality(facts: Facts) -> Figure:
    """Quality loss of the lossy passes over the work that is left: the metric, else the smallest cosine, else the error.

    The work is that before the next lossy pass: what a pass zeroes, later ones remove.
    """
    steps = facts.history.steps
    lossy = [step for step in steps if not step.exact and step.reverted is None]
    measure = next((candidate for candidate in _MEASURES if any(candidate[1](step) is not None for step in lossy)), None)
    if measure is None:
        raise UnsupportedError(
            "no lossy pass was measured, so there is no quality to draw; "
            "give passes such as `prune-heads`, with checks='numeric'"
        )
    label, read, start = measure
    shown = [(step, value) for step in lossy if (value := read(step)) is not None]
    figure, (axes,) = new_figure()
    first = steps[0]
    ends = [step.index - 1 for step, _ in shown[1:]] + [len(steps) - 1]
    units = [100 * steps[end].size.flops / max(first.size.flops, 1) for end in (0, *ends)]
    before = first.metric or 0.0 if start is None else start
    values = [before, *(value for _, value in shown)]
    axes.plot(units, values, "o-", color=MAIN)
    axes.plot(units[:1], values[:1], "o", color=MARKED)
    names = ["captured", *(step.spelling.partition("{")[0] for step, _ in shown)]
    for name, unit, value in zip(names, units, values, strict=True):
        axes.annotate(name, (unit, value), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set(title=facts.title, xlabel="% of the FLOPs as captured", ylabel=label)
    axes.margins(x=0.2)
    return figure


Measure = Callable[[Step], float | None]
_MEASURES: Sequence[tuple[str, Measure, float | None]] = (
    ("metric", lambda step: step.metric, None),
    ("smallest cosine to the original", lambda step: step.cosine, 1.0),
    ("relative error", lambda step: step.relative_error, 0.0),
)
"""Measures of quality, each with its value for the captured program; None if that value was measured."""

KINDS: Mapping[str, Callable[[Facts], Figure]] = {
    "roofline": _roofline,
    "latency": _latency,
    "quality": _quality,
    "training": _training,
}
