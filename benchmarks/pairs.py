"""Which techniques add up: every pair of passes on all-MiniLM-L6-v2, its loss and its speed beside those of the two alone.

    python benchmarks/pairs.py --update

The loss is 1 - cosine of the embeddings of WordNet glosses that passes have not seen; small losses of unlike techniques add
up. The speedup is over our own exact program, timed in turn, at 8 rows of 64 tokens; speedups of unlike techniques multiply.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from quality import conditions
from readme import put_table
from tune import Judge

from lissom.errors import LissomError
from lissom.frontends.models.huggingface import load

TECHNIQUES = {
    "heads": "prune-heads{keep=0.75}",
    "neurons": "prune-neurons{keep=0.75}",
    "layers": "prune-layers{keep=0.84}",
    "low-rank": "low-rank{keep=0.95}",
    "2:4": "sparsify{pattern=2:4}",
    "pooled heads": "pool-heads{keep=0.5}",
    "bf16": "cast,sink-casts,fold-casts",
    "int8": "quantize",
    "int4": "quantize{scheme=int4-weight}",
}
"""In the order in which they run in a pipeline."""
SAME = frozenset(("int8", "int4"))
"""Techniques that exclude each other."""


@dataclass(frozen=True)
class Figure:
    """speedup: over the exact program. loss: 1 - cosine."""

    speedup: float
    loss: float


def pipeline_of(names: Sequence[str]) -> str:
    """The passes of these techniques."""
    return ",".join(TECHNIQUES[name] for name in TECHNIQUES if name in names)


def measured(judge: Judge, names: Sequence[str]) -> Figure | str:
    """The figures of techniques together, or why they cannot be."""
    try:
        _, speedup, loss = judge.judge(pipeline_of(names), reported=True)
    except LissomError as error:
        return str(error).partition(";")[0].partition("\n")[0]
    return Figure(speedup, loss)


def table(judge: Judge) -> str:
    """The techniques alone, then pairs: measured and as expected of the two alone."""
    alone = {name: measured(judge, [name]) for name in TECHNIQUES}
    lines = ["| technique | passes | × faster | loss |", "|---|---|---:|---:|"]
    for name, figure in alone.items():
        cells = f"{figure.speedup:.2f} | {figure.loss:.4f}" if isinstance(figure, Figure) else f"{figure} | "
        lines.append(f"| {name} | `{TECHNIQUES[name]}` | {cells} |")
        print(lines[-1], flush=True)
    lines += ["", "| pair | × faster | of the product | loss | of the sum | adds up |", "|---|---:|---:|---:|---:|---|"]
    for first, second in itertools.combinations(TECHNIQUES, 2):
        one, other = alone[first], alone[second]
        if {first, second} == SAME or not (isinstance(one, Figure) and isinstance(other, Figure)):
            continue
        both = measured(judge, [first, second])
        if isinstance(both, Figure):
            fast, lost = both.speedup / (one.speedup * other.speedup), both.loss / (one.loss + other.loss)
            verdict = (
                "yes" if fast > 0.95 and lost < 1.25 else "in speed" if fast > 0.95 else "in loss" if lost < 1.25 else "no"
            )
            cells = f"{both.speedup:.2f} | {fast:.0%} | {both.loss:.4f} | {lost:.0%} | {verdict}"
        else:
            cells = f"{both} | | | | "
        lines.append(f"| {first}, {second} | {cells} |")
        print(lines[-1], flush=True)
    return "\n".join([*lines, "", f"{conditions()}."]) + "\n"


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--texts", type=int, default=256, help="calibration texts; %(default)s by default")
    parser.add_argument("--update", action="store_true", help="put the tables into benchmarks/README.md")
    options = parser.parse_args()
    text = table(Judge(load("minilm"), options.texts))
    if options.update:
        put_table("pairs", text, by_processor=True)


if __name__ == "__main__":
    main()
