"""Records of a comparison as a table on a terminal and as Markdown, with the machine and the versions."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Group, RenderableType
from rich.text import Text

from lissom.cli.bench.comparison import measurements
from lissom.cli.bench.engines import ENGINES
from lissom.cli.bench.worker import Failure, Measurement, Record
from lissom.inspect.tables import plain_table
from lissom.measure.machine import device_name

_LEGEND = (
    "ms of a call: median (middle half of the runs). cosine: to PyTorch eager in float32, the worst over the shapes. "
    "peak MB: of the engine's process, loading and compiling included. "
    "first s: from the start of compiling to the first answer, at the first shape."
)


def about(records: Sequence[Record], threads: int) -> str:
    """The processor, the threads, and the versions of the packages that ran."""
    ran = [engine for engine in ENGINES.values() if measurements(records, engine.name)]
    packages = dict.fromkeys(["lissom", "torch", "transformers", *(name for engine in ran for name in engine.packages)])
    versions = [f"{name} {number}" for name in packages if (number := _version(name))]
    return f"{device_name(torch.device('cpu'))}, {threads} threads; Python {platform.python_version()}, {', '.join(versions)}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def shapes_of(records: Sequence[Record]) -> list[str]:
    """The shapes of the records, in the order they were measured."""
    return list(dict.fromkeys(record.shape for record in records if record.shape is not None))


def failures(records: Sequence[Record]) -> list[str]:
    """A sentence for every engine that did not run, at a shape or at all."""
    return [
        f"{ENGINES[record.engine].title}{f' at {record.shape}' if record.shape else ''} did not run: {record.reason}"
        for record in records
        if isinstance(record, Failure)
    ]


def comparison_table(title: str, records: Sequence[Record], threads: int) -> RenderableType:
    """One row per engine, one column per shape; below it the machine and the failures."""
    table = plain_table(title, "")
    table.add_column("engine", overflow="fold")
    for heading in (*shapes_of(records), "cosine", "peak MB", "first s"):
        table.add_column(heading, justify="right")
    for title_, cells in _rows(records):
        table.add_row(Text(title_), *cells)
    # Not as a caption, which would wrap at the table's width.
    return Group(table, *map(Text, (_LEGEND, about(records, threads), *failures(records))))


def markdown_table(records: Sequence[Record], threads: int) -> str:
    """The records as a Markdown table, with the best median of each shape in bold."""
    shapes = shapes_of(records)
    head = ["engine", *(f"{shape}, ms" for shape in shapes), "cosine", "peak MB", "first s"]
    by_engine = [measurements(records, name) for name in ENGINES]
    best = {
        shape: min((measured[shape].median_ms for measured in by_engine if shape in measured), default=0.0) for shape in shapes
    }
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for title, cells in _rows(records, best):
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", _LEGEND, "", about(records, threads) + ".", ""]
    lines += [f"- {sentence.replace('<', '&lt;')}" for sentence in failures(records)]
    return "\n".join(lines).rstrip() + "\n"


def _rows(records: Sequence[Record], best: dict[str, float] | None = None) -> list[tuple[str, list[str]]]:
    shapes = shapes_of(records)
    rows: list[tuple[str, list[str]]] = []
    for name, engine in ENGINES.items():
        measured = measurements(records, name)
        if not measured:
            continue
        timings = [_cell(measured.get(shape), best) for shape in shapes]
        first = next(iter(measured.values()))
        worst = min(measurement.cosine for measurement in measured.values())
        peak = max(measurement.peak_mb for measurement in measured.values())
        rows.append((engine.title, [*timings, cosine_text(worst), f"{peak:.0f}", f"{first.first_answer_seconds:.1f}"]))
    return rows


def _cell(measurement: Measurement | None, best: dict[str, float] | None) -> str:
    if measurement is None:
        return "—"
    median, _, spread = str(measurement.timing).partition(" ")
    bold = best is not None and measurement.median_ms == best[measurement.shape]
    return f"{f'**{median}**' if bold else median} {spread}"


def cosine_text(value: float) -> str:
    """Five decimals without trailing zeros: `0.9976`, `0.99996`, `1`."""
    return f"{value:.5f}".rstrip("0").rstrip(".")
