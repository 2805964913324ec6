"""The speedup of `pack-tokens` on ragged batches: all-MiniLM-L6-v2 on batches of real glosses, padded and packed.

    python benchmarks/packing.py --update

Both programs run in one process, call by call in turn, on each backend. Their embeddings are compared at real tokens first.
Prints a Markdown table; `--update` puts it into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import platform
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from readme import put_table

import lissom
from lissom.cli.calibration_files import read_texts
from lissom.frontends.models.huggingface import load
from lissom.measure.machine import device_name
from lissom.measure.timing import Timing, time_calls

GLOSSES = Path(__file__).parent / "data" / "glosses.txt"
BACKENDS = "eager,onnxruntime"
PACKED = "zero-padding,pack-tokens"


@dataclass(frozen=True)
class Row:
    """One backend on one batch.

    real: the fraction of positions that are tokens. error: the largest difference at real tokens over the largest value.
    """

    backend: str
    shape: tuple[int, int]
    real: float
    padded: Timing
    packed: Timing
    error: float


def measure(backend: str, rows: int, batches: int, seconds: float, extra: str) -> list[Row]:
    """The backend's times on each batch of glosses."""
    checkpoint = load("minilm")
    texts = read_texts(GLOSSES)
    example = checkpoint.encode(texts[:4])
    plain, packed = (
        lissom.compile(checkpoint.model, example, passes=",".join(filter(None, (passes, extra))) or "exact", backend=backend)
        for passes in ("", PACKED)
    )
    measured: list[Row] = []
    for first in range(0, rows * batches, rows):
        inputs = checkpoint.encode(texts[first : first + rows])
        real = inputs["attention_mask"].bool()
        wanted, given = (model(**inputs).last_hidden_state[real] for model in (plain, packed))
        error = float((wanted - given).abs().max() / wanted.abs().max())
        timings = time_calls({"padded": partial(plain, **inputs), "packed": partial(packed, **inputs)}, seconds)
        shape = (len(real), real.shape[1])
        measured.append(Row(backend, shape, float(real.float().mean()), timings["padded"], timings["packed"], error))
    return measured


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| backend | batch | real tokens | padded, ms | packed, ms | gain | error |", "|---|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        gain = row.padded.median_ms / row.packed.median_ms
        lines.append(
            f"| {row.backend} | {row.shape[0]}x{row.shape[1]} | {row.real:.0%} | {row.padded} | {row.packed} "
            f"| {gain:.2f} | {row.error:.0e} |"
        )
    names = ("lissom", "torch", "transformers", "onnxruntime")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    processor, threads = device_name(torch.device("cpu")), torch.get_num_threads()
    where = f"{processor}, {threads} threads; Python {platform.python_version()}, {versions}."
    return "\n".join([*lines, "", where, ""])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backends", default=BACKENDS, help="some of %(default)s")
    parser.add_argument("--rows", type=int, default=32, help="glosses in a batch")
    parser.add_argument("--batches", type=int, default=3, help="consecutive batches from the file")
    parser.add_argument("--passes", default="", help="passes for both programs after the packing, such as cast{dtype=bf16}")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds per program and batch")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for backend in options.backends.split(","):
        rows += measure(backend, options.rows, options.batches, options.seconds, options.passes)
    printed = table(rows)
    print(printed)
    if options.update:
        put_table("packing", printed)


if __name__ == "__main__":
    main()
