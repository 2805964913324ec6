"""The hot layers of a program: the few that take most of its time, each with its kernel and its share of the roofline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import fx

from lissom.compiler.analysis.cost import costs_on
from lissom.compiler.ir.program import Program
from lissom.inspect.kernels import Kernel, kernel_of, module_pattern, shape_of
from lissom.inspect.roofline import digits, sizes_text
from lissom.inspect.tables import plain, plain_table
from lissom.measure.machine import Ceilings, Machine
from lissom.measure.roofline import node_seconds

_SHARE = 0.8
_MOST = 8
_UNMEASURED = "Run `lissom machine` once to see shares of the roofline."


@dataclass(frozen=True)
class LayerTime:
    """Layers that are equal but for their numbers: one module pattern, one shape, one kernel.

    Attributes:
        pattern: the module path, with `*` for numbers; empty for the model itself.
        count: the number of layers.
        shape: `rows × inputs → features` of linear layers, the sizes of the output of others.
        kernel: what runs them.
        milliseconds: the sum of their medians.
        roof_ms: the sum of their rooflines; None without the machine's ceilings.
        flops: of all of them; 0 where they are not known.
        moved_bytes: likewise.

    Examples:
        >>> import torch, lissom
        >>> fast = lissom.compile(torch.nn.Sequential(torch.nn.Linear(256, 256)), torch.randn(64, 256))
        >>> (layer,) = fast.report.kernels().layers
        >>> layer.count, layer.shape
        (1, '64 × 256 → 256')
    """

    pattern: str
    shape: str
    kernel: Kernel
    count: int
    milliseconds: float
    roof_ms: float | None
    flops: int = 0
    moved_bytes: int = 0


@dataclass(frozen=True, repr=False)
class LayerTimes:
    """The time of every layer of a program, the slowest first; prints as a table of the hot ones.

    Attributes:
        title: the program, its backend, and the sizes of the inputs.
        without_roof: why no layer has a roofline, if none has.
        nodes: the milliseconds of every node by its name; empty where the backend times operators of its own.
        ceilings: of the device that ran it; None if they are not known.

    Examples:
        >>> import torch, lissom
        >>> times = lissom.compile(torch.nn.Linear(256, 512), torch.randn(64, 256)).report.kernels()
        >>> times.whole_ms > 0, times.share(times.layers)
        (True, 1.0)
    """

    title: str
    layers: tuple[LayerTime, ...]
    without_roof: str = _UNMEASURED
    nodes: Mapping[str, float] = field(default_factory=dict[str, float])
    ceilings: Ceilings | None = None

    @property
    def whole_ms(self) -> float:
        """The time of all operators, without dispatch between them."""
        return sum(layer.milliseconds for layer in self.layers)

    @property
    def hot(self) -> tuple[LayerTime, ...]:
        """The fewest layers that take 80 % of the time; eight at most."""
        hottest: list[LayerTime] = []
        for layer in self.layers[:_MOST]:
            if self.share(hottest) >= _SHARE:
                break
            hottest.append(layer)
        return tuple(hottest)

    def share(self, layers: Collection[LayerTime]) -> float:
        """The fraction of the time that these layers take."""
        return sum(layer.milliseconds for layer in layers) / self.whole_ms if self.whole_ms else 0.0

    @property
    def summary(self) -> str:
        """One line: `hot layers: 24 × packed_linear take 84 % of the time and reach 71 % of the roofline`."""
        counts: Counter[str] = Counter()
        for layer in self.hot:
            counts[layer.kernel.operator] += layer.count
        listed = ", ".join(f"{count} × {operator}" for operator, count in counts.items())
        words = f"hot layers: {listed or 'none'} take {100 * self.share(self.hot):.0f} % of the time"
        reached = roof_share(self.hot)
        return words if reached is None else f"{words} and reach {100 * reached:.0f} % of the roofline"

    def __rich__(self) -> RenderableType:
        return _table(self)

    def __str__(self) -> str:
        return plain(_table(self))

    def __repr__(self) -> str:
        return f"<LayerTimes of {self.title}: {len(self.layers)} rows; print it to read the hot ones>"


def roof_share(layers: Sequence[LayerTime]) -> float | None:
    """The fraction of the roofline that layers reach together; None without the machine's ceilings, or without any work."""
    roofs = [layer.roof_ms for layer in layers if layer.roof_ms is not None]
    total_ms = sum(layer.milliseconds for layer in layers)
    return sum(roofs) / total_ms if any(roofs) and total_ms else None


def layer_times(
    program: Program,
    tensors: Sequence[torch.Tensor],
    milliseconds: Mapping[fx.Node, float],
    machine: Machine | None,
    *,
    backend: str,
    measured: Collection[str] = (),
) -> LayerTimes:
    """Equal layers of a program added up, the slowest first.

    Args:
        tensors: the flat inputs of the run that gave the milliseconds.
        measured: the names of the nodes for which PyTorch's kernel was measured faster than ours.
    """
    named, costs = costs_on(program, tensors)
    sizes = program.signature.sizes_of(tensors)
    groups: dict[tuple[str, str, Kernel], list[fx.Node]] = {}
    for node in program.nodes():
        key = module_pattern(node), shape_of(node, sizes), kernel_of(node, node.name in measured)
        groups.setdefault(key, []).append(node)
    layers: list[LayerTime] = []
    for key, members in groups.items():
        roof = None if machine is None else 1e3 * sum(node_seconds(node, costs[node], machine) for node in members)
        work, moved = (
            int(sum(sizes)) for sizes in zip(*((costs[node].flops, costs[node].bytes) for node in members), strict=True)
        )
        layers.append(LayerTime(*key, len(members), sum(milliseconds[node] for node in members), roof, work, moved))
    layers.sort(key=lambda layer: -layer.milliseconds)
    ceilings = None if machine is None else machine.on(tensors[0].device if tensors else torch.device("cpu"))
    by_name = {node.name: milliseconds[node] for node in program.nodes()}
    return LayerTimes(f"{program.name} on {backend}, {sizes_text(named)}", tuple(layers), nodes=by_name, ceilings=ceilings)


def _table(measured: LayerTimes) -> Table:
    known = any(layer.roof_ms is not None for layer in measured.layers)
    hot = measured.hot
    title = f"hot layers of {measured.title}: {100 * measured.share(hot):.0f} % of {digits(measured.whole_ms)} ms\n"
    table = plain_table(title, _caption(known, measured.without_roof))
    table.add_column("layer, shape\nkernel", overflow="fold")
    for heading in ("ms", "% of\ntime", *(("% of\nroof",) if known else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in hot:
        times = f" ×{layer.count}" if layer.count > 1 else ""
        label = f"{layer.pattern or 'the model itself'}{times}, {layer.shape}\n{layer.kernel}"
        row = [digits(layer.milliseconds), f"{100 * measured.share([layer]):.1f}"]
        reached = roof_share([layer])
        row += [("" if reached is None else _percent(reached))] if known else []
        table.add_row(Text(label), *row)
    return table


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f}" if fraction >= 0.005 else "<1"


def _caption(known: bool, without_roof: str) -> str:
    words = (
        "Shapes: rows × inputs → features; heads × features, batch × tokens; or an output's sizes. "
        "ms: medians, operator by operator, equal layers added up; time between operators is not counted."
    )
    roof = "roof: the least time by the ceilings `lissom machine` shows, if all comes from memory; caches give more than 100 %."
    return f"{words}\n{roof if known else without_roof}"
