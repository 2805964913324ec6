"""The cost of zeros in weights: perplexity of Gemma 3 270M on WordNet glosses, by criterion and pattern.

    python benchmarks/sparsity.py
    python benchmarks/sparsity.py --update

The program is captured once, and each variant of `sparsify` starts from it. Glosses are joined line by line and read in
windows, each of which begins with the BOS token. Calibration windows come from other synsets. `--update` puts the table into
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from quality import conditions, decoder_inputs, losses, windows
from readme import put_table

import lissom
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.frontends.models.huggingface import Checkpoint, load
from lissom.passes.prune.sparsify import Sparsify

CRITERIA = ("magnitude", "wanda", "sparsegpt")
WINDOW = 128


def perplexity(program: Program, checkpoint: Checkpoint, texts: Sequence[torch.Tensor]) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window."""
    return float(losses(program, checkpoint, texts).mean().exp())


def zeros(program: Program, dense: Program) -> float:
    """The fraction of zeros in the treated matrices."""
    treated = [weight for name, weight in program.weights().items() if weight is not dense.weight(name)]
    return sum(int((weight == 0).sum()) for weight in treated) / max(1, sum(weight.numel() for weight in treated))


def measure(checkpoint: Checkpoint, chosen: Sequence[Sparsify], calibration: int, evaluation: int) -> str:
    """The perplexity of the program and after each pass, as Markdown."""
    dense = lissom.optimize(checkpoint.model, checkpoint.example_inputs, checks="structural").program
    texts = windows(checkpoint, "evaluation", evaluation * (WINDOW - 1), WINDOW)
    given = windows(checkpoint, "calibration", calibration * (WINDOW - 1), WINDOW)
    data = [dense.signature.flatten((), decoder_inputs(checkpoint, ids)) for ids in given]
    lines = ["| what is kept | criterion | zeros in these layers | perplexity | s |", "|---|---|---:|---:|---:|"]
    lines.append(f"| all | | | {perplexity(dense, checkpoint, texts):.2f} | |")
    print(lines[-1], file=sys.stderr, flush=True)
    for sparsify in chosen:
        started = time.perf_counter()
        program, _ = Pipeline([sparsify], checks="structural", data=data).run(dense)
        seconds = time.perf_counter() - started
        cells = [sparsify.pattern or f"{sparsify.keep:.0%}", sparsify.criterion, f"{zeros(program, dense):.1%}"]
        lines.append(f"| {' | '.join(cells)} | {perplexity(program, checkpoint, texts):.2f} | {seconds:.0f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    tokens = sum(ids.shape[1] - 1 for ids in texts)
    about = f"{tokens:,} tokens evaluated, {calibration * WINDOW:,} for calibration, windows of {WINDOW}"
    return "\n".join([*lines, "", f"{about}. {conditions()}."]) + "\n"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keep", type=float, nargs="*", default=[0.5], help="fractions kept; %(default)s by default")
    parser.add_argument("--patterns", nargs="*", default=["2:4"], help="patterns; %(default)s by default")
    parser.add_argument("--calibration", type=int, default=64, help="calibration windows; %(default)s by default")
    parser.add_argument("--evaluation", type=int, default=32, help="evaluated windows; %(default)s by default")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    options = parser.parse_args()
    chosen = [Sparsify(keep=keep, criterion=criterion) for keep in options.keep for criterion in CRITERIA]
    chosen += [Sparsify(pattern=pattern, criterion=criterion) for pattern in options.patterns for criterion in CRITERIA]
    printed = measure(load("gemma3-270m"), chosen, options.calibration, options.evaluation)
    print(printed)
    if options.update:
        put_table("sparsity", printed)


if __name__ == "__main__":
    main()
