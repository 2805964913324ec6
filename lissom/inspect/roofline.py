"""Tables of costs and rooflines: the sites of a program, and the ceilings of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from lissom.compiler.analysis.cost import Cost, cost, example_sizes, site_costs, total_cost
from lissom.compiler.ir.program import Program
from lissom.inspect.folding import fold_rows
from lissom.inspect.tables import plain_table
from lissom.measure.machine import Machine
from lissom.measure.roofline import node_seconds


def cost_table(program: Program, sizes: Mapping[str, int], machine: Machine | None) -> Table:
    """One row per site: operations, megabytes, parameters, intensity, and the roofline if the machine's ceilings are known.

    Args:
        sizes: sizes of dimensions by name; the others are the example's.

    Raises:
        UnsupportedError: for a dimension the program does not have, or a size it does not take.
    """
    chosen = example_sizes(program) | dict(sizes)
    rows, unknown = _rows(program, chosen, machine)
    table = plain_table(f"{program.name}, {sizes_text(chosen)}", _caption(machine, unknown))
    table.padding = (0, 0, 0, 0)
    table.add_column("site", overflow="fold")
    for heading in ("GFLOP", "read\nMB", "write\nMB", "param\nM", "FLOP/\nbyte", *(("roof\nms",) if machine else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("% of\nroof" if machine else "% of\nFLOP", justify="right", no_wrap=True)
    whole = rows[-1].effort or 1.0
    written = [(row.label, *row.numbers(), f"{100 * row.effort / whole:.1f}") for row in rows]
    for label, *numbers in fold_rows(written[:-1]):
        table.add_row(Text(label), *numbers)
    table.add_section()
    table.add_row(*written[-1])
    return table


@dataclass(frozen=True)
class _Row:
    """A row of the cost table.

    Attributes:
        milliseconds: the sum over its nodes.
    """

    label: str
    cost: Cost
    milliseconds: float | None

    @property
    def effort(self) -> float:
        return float(self.cost.flops) if self.milliseconds is None else self.milliseconds

    def numbers(self) -> list[str]:
        timed = [] if self.milliseconds is None else [digits(self.milliseconds)]
        return [*_numbers(self.cost), *timed]


def _rows(program: Program, sizes: Mapping[str, int], machine: Machine | None) -> tuple[list[_Row], bool]:
    """A row for every site and one for the whole program, and whether any sizes depend on values."""
    total = total_cost(program, sizes)
    zeros = dict.fromkeys(total.symbols, 0)
    costs = {node: node_cost.at(zeros) for node, node_cost in cost(program, sizes).items()}
    parts = [
        (f"{site.layer} {site.kind}".strip(), site_cost, site.nodes) for site, site_cost in site_costs(program, sizes).items()
    ]
    rows: list[_Row] = []
    for label, part_cost, members in [*parts, ("whole program", total, tuple(costs))]:
        seconds = None if machine is None else sum(node_seconds(node, costs[node], machine) for node in members)
        rows.append(_Row(label, part_cost.at(zeros), None if seconds is None else seconds * 1e3))
    return rows, bool(zeros)


def _numbers(part_cost: Cost) -> list[str]:
    values = (part_cost.flops, part_cost.read_bytes, part_cost.written_bytes, part_cost.parameters)
    scaled = [float(value) / scale for value, scale in zip(values, (1e9, 1e6, 1e6, 1e6), strict=True)]
    return [*map(digits, scaled), digits(float(part_cost.intensity))]


def digits(value: float) -> str:
    """Three significant digits without exponent, in five characters up to 99,999; empty for 0."""
    if value < 0.0005:
        return "<.001" if value else ""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3f}" if value < 0.9995 else f"{value:.3g}"


def sizes_text(sizes: Mapping[str, int]) -> str:
    """`batch 8, sequence 128`."""
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or "all sizes fixed"


def _caption(machine: Machine | None, unknown: bool) -> str:
    words = "Every node reads its inputs and writes its outputs once; views move nothing."
    if unknown:
        words += "\nSizes that depend on the values of the inputs count as 0."
    if machine is None:
        return f"{words}\nRun `lissom machine` once to see the roofline in milliseconds."
    return f"{words}\nThe roof is the least time if all of it comes from memory, by the ceilings `lissom machine` shows."


def machine_table(machine: Machine) -> Table:
    """The ceilings of the processor and of every CUDA device, with the quartiles of the runs."""
    title = f"{machine.cpu.name}: {machine.cores} cores, {machine.threads} threads, torch {machine.torch}"
    table = plain_table(title, _about(machine))
    for heading in ("ceiling", "median", "middle half", "unit", "by"):
        table.add_column(heading, justify="right" if heading in ("median", "middle half") else "left", no_wrap=True)
    for device in (machine.cpu, *machine.devices):
        if device is not machine.cpu:
            table.add_section()
            table.add_row(Text(device.name))
        for label, ceiling, unit in (
            ("matrix products, fp32", device.fp32_gflops, "GFLOP/s"),
            ("matrix products, bf16", device.bf16_gflops, "GFLOP/s"),
            ("matrix products, int8", device.int8_gops, "GOP/s"),
            ("memory bandwidth", device.memory_gb_per_second, "GB/s"),
        ):
            if ceiling is None:
                table.add_row(label, "none")
                continue
            between = f"{digits(ceiling.low)} to {digits(ceiling.high)}"
            table.add_row(label, digits(ceiling.median), between, unit, ceiling.how)
    return table


def _about(machine: Machine) -> str:
    caches = {"L1d": machine.l1d_bytes, "L2": machine.l2_bytes, "L3": machine.l3_bytes}
    known = ", ".join(f"{name} {size >> 10} KiB" for name, size in caches.items() if size is not None)
    return f"caches: {known or 'unknown'}\ninstructions: {' '.join(machine.isa) or 'unknown'}\nmeasured on {machine.measured}"
