"""The profile of a compiled program: the time of every site and operator, measured node by node, against its roofline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text
from torch import fx

from lissom.api import compile
from lissom.backends.eager.node_times import time_nodes
from lissom.cli.bench.workload import Inputs, Shape, load_model, make_inputs
from lissom.compiler.analysis.cost import Cost, costs_on
from lissom.compiler.analysis.sites import sites
from lissom.inspect.kernels import operator_name
from lissom.inspect.roofline import digits, sizes_text
from lissom.inspect.tables import plain_table
from lissom.measure.machine import Machine
from lissom.measure.roofline import node_seconds
from lissom.measure.timing import time_calls
from lissom.ops.native import describe_kernels
from lissom.runtime.compiled_model import CompiledModel


@dataclass(frozen=True)
class Part:
    """All calls of one operator at sites of one kind, summed over layers; matrix products are separated by module.

    Attributes:
        milliseconds: the sum of their medians.
        roof_ms: the sum of their rooflines.
    """

    kind: str
    operator: str
    calls: int
    milliseconds: float
    flops: float
    moved_bytes: float
    roof_ms: float


@dataclass(frozen=True)
class Profile:
    """The profile at one size.

    Attributes:
        whole_ms: the median of a call of the compiled model.
        parts: in the order of the graph.
    """

    title: str
    whole_ms: float
    parts: tuple[Part, ...]

    @property
    def between_ms(self) -> float:
        """The time of a call outside its operators: argument checks, dispatch; negative if timing single nodes costs more."""
        return self.whole_ms - sum(part.milliseconds for part in self.parts)


def profile_model(
    name: str,
    *,
    passes: str,
    shapes: Sequence[Shape] | None,
    texts: Sequence[str] | None,
    machine: Machine,
    seconds: float,
) -> Iterator[Profile]:
    """Compile a model for the backend eager, and measure it at every shape.

    Args:
        name: as in `cli.bench.workload`.
        shapes: as in `cli.bench.workload`.
        texts: as in `cli.bench.workload`.

    Raises:
        LissomError: if the model cannot be loaded or compiled.
    """
    model = load_model(name)
    inputs = make_inputs(model, shapes, texts)
    compiled = compile(model.source.model, model.example | dict(model.constants), passes=passes, goal=None)
    for tensors in inputs.values():
        yield profile(compiled, tensors, model.constants, machine, seconds)


def profile(
    compiled: CompiledModel, inputs: Inputs, constants: Mapping[str, object], machine: Machine, seconds: float
) -> Profile:
    """Measure a compiled model on these inputs: `seconds` as a whole, and `seconds` node by node.

    Raises:
        InputError: if the inputs do not fit the program.
    """
    program = compiled.program
    tensors = program.signature.flatten((), {**inputs, **constants})
    whole = time_calls({"call": lambda: compiled(**inputs, **constants)}, seconds)["call"].median_ms
    milliseconds = time_nodes(program, tensors, seconds)
    sizes, costs = costs_on(program, tensors)
    groups: dict[tuple[str, str], list[fx.Node]] = {}
    for site in program.fact(sites):
        for node in site.nodes:
            groups.setdefault((site.kind, operator_name(node)), []).append(node)
    parts = [_part(*key, members, milliseconds, costs, machine) for key, members in groups.items()]
    return Profile(f"{program.name} on {compiled.backend}, {sizes_text(sizes)}", whole, tuple(parts))


def _part(
    kind: str,
    operator: str,
    members: Sequence[fx.Node],
    milliseconds: Mapping[fx.Node, float],
    costs: Mapping[fx.Node, Cost],
    machine: Machine,
) -> Part:
    return Part(
        kind,
        operator,
        len(members),
        sum(milliseconds[node] for node in members),
        float(sum(costs[node].flops for node in members)),
        float(sum(costs[node].bytes for node in members)),
        1e3 * sum(node_seconds(node, costs[node], machine) for node in members),
    )


def profile_table(profile: Profile) -> Table:
    """A section per kind of site: its operators with time, fraction, work and roofline; then dispatch, and the whole call."""
    caption = (
        "ms: medians, node by node; roof: the least time by the ceilings `lissom machine` shows, if all comes from memory. "
        f"Kernels of operators that begin with `lissom.`: {describe_kernels()}."
    )
    table = plain_table(profile.title, caption)
    table.add_column("site: operator", overflow="fold")
    for heading in ("calls", "ms", "%", "GFLOP", "MB", "roof\nms", "ms /\nroof"):
        table.add_column(heading, justify="right", no_wrap=True)
    kinds = dict.fromkeys(part.kind for part in profile.parts)
    for kind in kinds:
        members = [part for part in profile.parts if part.kind == kind]
        members.sort(key=lambda part: -part.milliseconds)
        table.add_row(Text(kind, style="bold"), *_numbers(members, profile.whole_ms))
        for part in members:
            table.add_row(Text(f"  {part.operator}"), *_numbers([part], profile.whole_ms))
        table.add_section()
    between = profile.between_ms
    table.add_row("between operators (dispatch)", "", digits_signed(between), f"{100 * between / profile.whole_ms:.1f}")
    whole = _numbers(profile.parts, profile.whole_ms, profile.whole_ms)
    table.add_row(Text("a whole call", style="bold"), *whole)
    return table


def digits_signed(value: float) -> str:
    """Like `digits`, for a number that may be negative."""
    return f"-{digits(-value)}" if value < 0 else digits(value)


def _numbers(parts: Iterable[Part], whole_ms: float, milliseconds: float | None = None) -> list[str]:
    members = list(parts)
    total_ms = sum(part.milliseconds for part in members) if milliseconds is None else milliseconds
    roof = sum(part.roof_ms for part in members)
    return [
        str(sum(part.calls for part in members)),
        digits(total_ms),
        f"{100 * total_ms / whole_ms:.1f}",
        digits(sum(part.flops for part in members) / 1e9),
        digits(sum(part.moved_bytes for part in members) / 1e6),
        digits(roof),
        digits(total_ms / roof) if roof else "",
    ]
