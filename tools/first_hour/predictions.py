"""Predicted milliseconds of each row of the GPU table, by roofline, before anything is measured.

    python -m tools.first_hour.predictions --update     # writes the table of docs/cuda.md

Each kernel takes max(operations / peak, bytes / bandwidth) of a card's published figures, reads its inputs and writes its
outputs once, and has an overhead. The programs are captured with one and two layers; layers are alike, so the time of n layers
is that of one plus n - 1 times the difference.

What is a kernel is assumed, as it is not known before: in PyTorch every operator; with CUDA graphs too; in TorchInductor every
product and attention, and the operators between two of them together. A quantized layer is a kernel that quantizes its input
and a product in the scheme. int4 multiplies in half precision.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import fx

from benchmarks.gpu_rows import BATCHES, DTYPES, ROWS, SHAPES, TITLES, Row, scheme_of
from lissom.compiler.analysis.cost import Cost, cost
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.frontends.capture.export import capture
from tools.first_hour.cards import CARDS, Card

aten = torch.ops.aten
OVERHEAD = 2.5e-6
"""Seconds from the end of a kernel to the work of the next: an assumption."""
EAGER_INTERVAL = 8e-6
"""Seconds from one kernel to the next where PyTorch's Python code launches them, at least: an assumption."""
_WEIGHT_BYTES = {"int8": 1.0, "fp8": 1.0, "int4": 0.5}
"""Of one weight, without scales."""
_PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "cuda.md"
_PLACE = re.compile(r"(<!-- predictions -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Kernel:
    """One kernel at one batch size.

    Attributes:
        bytes: read and written.
        weights: elements of a linear layer's weight that a scheme quantizes; 0 for other kernels.
        inputs: elements of the layer's input.
    """

    flops: float
    bytes: float
    weights: int = 0
    inputs: int = 0


def seconds(kernels: Sequence[Kernel], card: Card, row: Row) -> float:
    """The time of these kernels one after the other on a card."""
    scheme, wide = scheme_of(row.engine), row.dtype == "float32"
    taken = 0.0
    for kernel in kernels:
        peak, moved = card.fp32 if wide else card.half, kernel.bytes
        if scheme is not None and kernel.weights:
            peak = {"int8": card.eight, "fp8": card.fp8 or math.nan, "int4": card.half}[scheme]
            moved -= (2 - _WEIGHT_BYTES[scheme]) * kernel.weights
            if scheme != "int4":
                moved -= kernel.inputs  # 8 bits instead of 16
                taken += _with_overhead(3 * kernel.inputs / card.bandwidth / 1e9, row.engine)
        taken += _with_overhead(max(kernel.flops / peak / 1e12, moved / card.bandwidth / 1e9), row.engine)
    return taken


def _with_overhead(taken: float, engine: str) -> float:
    return max(taken + OVERHEAD, EAGER_INTERVAL if engine == "eager" else 0.0)


def predict(row: Row, batch: int, card: Card) -> float | None:
    """Milliseconds of a row at a batch size: a prediction. None for fp8 on a card without such products."""
    if scheme_of(row.engine) == "fp8" and card.fp8 is None:
        return None
    fused = row.engine == "torch.compile" or row.engine.endswith("-inductor")
    dtype = "float32" if row.dtype == "float32" else "bfloat16"
    one, two = (seconds(kernels(row.model, layers, dtype, batch, fused), card, row) for layers in (1, 2))
    return 1e3 * (one + (SHAPES[row.model].sizes["layers"] - 1) * (two - one))


@cache
def kernels(model: str, layers: int, dtype: str, batch: int, fused: bool) -> list[Kernel]:
    """The kernels of a model of that many layers; those between two products as one if they are fused."""
    program = _program(model, layers, dtype)
    sizes = {name: batch if name == "batch" else SHAPES[model].sequence for name in _names(program)}
    costs = {node: found for node, found in cost(program, sizes).items() if found.bytes}
    found, between = list[Kernel](), list[fx.Node]()
    for node, its_cost in costs.items():
        if fused and not its_cost.flops:
            between.append(node)
            continue
        if between:
            found.append(_together(between, costs))
            between = []
        found.append(_alone(node, its_cost))
    return [*found, _together(between, costs)] if between else found


@cache
def _program(model: str, layers: int, dtype: str) -> Program:
    shape = SHAPES[model]
    built = shape.build(layers=layers).to(getattr(torch, dtype))
    inputs = shape.inputs(2, 16)
    given = {name: item.to(getattr(torch, dtype)) if item.is_floating_point() else item for name, item in inputs.items()}
    return capture(built, kwargs=given).program


def _names(program: Program) -> list[str]:
    return [dimension.name for dimension in program.signature.dimensions.values()]


def _alone(node: fx.Node, its_cost: Cost) -> Kernel:
    flops, moved = float(its_cost.flops), float(its_cost.bytes)
    if node.target is not aten.linear.default or _is_head(node):
        return Kernel(flops, moved)
    weight = nodes.tensor_type(nodes.operand(node, 1)).shape
    features, inputs = (int(size) for size in weight)
    return Kernel(flops, moved, features * inputs, int(flops) // (2 * features))


def _is_head(node: fx.Node) -> bool:
    """True for an LM head, which the default of `quantize` leaves as it is."""
    return all(user.op == "output" for user in node.users)


def _together(members: Sequence[fx.Node], costs: dict[fx.Node, Cost]) -> Kernel:
    """One kernel that computes the members: it reads what others wrote, and writes what others read."""
    inside = set(members)
    moved = 0.0
    for node in members:
        if any(user not in inside for user in _readers(node, costs)):
            moved += float(costs[node].written_bytes)
        own = {source for operand in node.all_input_nodes for source in _sources(operand, costs) if source in inside}
        moved += max(0.0, float(costs[node].read_bytes) - sum(float(costs[source].written_bytes) for source in own))
    return Kernel(0.0, moved)


def _readers(node: fx.Node, costs: dict[fx.Node, Cost]) -> list[fx.Node]:
    """The nodes that read its values, through views."""
    return [
        reader for user in node.users for reader in ([user] if user in costs or user.op == "output" else _readers(user, costs))
    ]


def _sources(node: fx.Node, costs: dict[fx.Node, Cost]) -> set[fx.Node]:
    """The nodes whose values it holds, through views."""
    if node in costs or node.op != "call_function":
        return {node}
    return {source for operand in node.all_input_nodes for source in _sources(operand, costs)}


def table() -> str:
    """The predictions of all rows on all cards, as Markdown."""
    head = [f"| model | dtype | engine | {' | '.join(CARDS)} |", f"|---|---|---|{'---:|' * len(CARDS)}"]
    return "\n".join([*head, *(line for model in SHAPES for line in lines_of(model))]) + "\n"


def lines_of(model: str) -> list[str]:
    """The rows of a model; float16 and bfloat16 are alike."""
    lines = list[str]()
    for half in (True, False):
        for engine in TITLES:
            rows = [row for row in ROWS if (row.model, row.engine, row.dtype != "float32") == (model, engine, half)]
            if rows:
                dtypes = ", ".join(dtype for dtype in DTYPES if dtype in {row.dtype for row in rows})
                cells = [_cell([predict(rows[0], batch, card) for batch in BATCHES]) for card in CARDS.values()]
                lines.append(f"| {model} | {dtypes} | {TITLES[engine]} | {' | '.join(cells)} |")
    return lines


def sources() -> str:
    """The published figures, as Markdown."""
    lines = ["| card | fp32 | fp16, bf16 | int8 | fp8 | memory, GB/s |", "|---|---:|---:|---:|---:|---:|"]
    for name, card in CARDS.items():
        fp8 = "none" if card.fp8 is None else f"{card.fp8:g}"
        lines.append(
            f"| [{name}]({card.source}) | {card.fp32:g} | {card.half:g} | {card.eight:g} | {fp8} | {card.bandwidth:g} |"
        )
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float | None]) -> str:
    return " / ".join(digits(value) for value in values if value is not None) or "none"


def digits(value: float) -> str:
    """Three significant digits: `0.44`, `12.3`, `312`."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def predictions_of(model: str) -> dict[str, dict[str, list[float | None]]]:
    """Milliseconds at each batch size by row and card."""
    rows: list[Row] = [row for row in ROWS if row.model == model]
    numbers: Callable[[Row, Card], list[float | None]] = lambda row, card: [predict(row, batch, card) for batch in BATCHES]  # noqa: E731
    return {str(row): {name: numbers(row, card) for name, card in CARDS.items()} for row in rows}


def main() -> None:
    """Print the predictions, or write them down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write the table of docs/cuda.md")
    parser.add_argument("--json", metavar="MODEL", choices=SHAPES, help="print those of one model as JSON")
    options = parser.parse_args()
    with torch.no_grad():
        if options.json:
            print(json.dumps(predictions_of(options.json)))
            return
        text = f"{sources()}\n{table()}"
    print(text)
    if options.update:
        page = _PAGE.read_text(encoding="utf-8")
        _PAGE.write_text(_PLACE.sub(lambda match: f"{match[1]}{text}{match[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
