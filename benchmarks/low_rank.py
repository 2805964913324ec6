"""Cost and gain of low rank: activation-aware against plain SVD at equal bytes, and latency against rank.

    python benchmarks/low_rank.py minilm
    python benchmarks/low_rank.py gemma3-270m
    python benchmarks/low_rank.py minilm --update

For each budget, all-MiniLM-L6-v2 or Gemma 3 270M is factored with calibration data and from its weights alone; quality is that
of quality.py. Embedding tables and LM heads stay as they are. For MiniLM the program compiled for the CPU backend is also timed
at several ranks against our own dense program, in turn in one process. `--update` puts the tables into README.md, and the
latencies into low_rank.svg.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from curves import TITLES
from figures import save, subplots
from quality import (
    calibration_batches,
    conditions,
    cosine,
    decoder_batches,
    difference,
    latency_share,
    losses,
    optimized,
    perplexity_change,
    read_pairs,
    retrieve,
    timed_inputs,
    windows,
)
from readme import put_table

import lissom
from lissom.compiler.ir.program import Program
from lissom.frontends.models.huggingface import Checkpoint, load

FIGURE = Path(__file__).parent / "low_rank.svg"
BUDGETS = (0.9, 0.75, 0.5)
RANKS = (32, 64, 96, 128, 160, 192)
SHAPES = ((1, 32), (8, 128))
"""Rows and tokens of the latency measurements."""
WAYS = {
    "activations, Fisher": "",
    "activations": ",fisher=false",
    "plain SVD": ",whiten=false",
}
"""The data the factors are fitted to, as named in the table, with its options."""
HEADS = {
    "minilm": ("recall@10", "change (95 %)", "cosine, mean"),
    "gemma3-270m": ("perplexity", "change (± standard error)"),
}

Score = Callable[[Callable[..., object]], list[str]]
"""Maps a callable to the cells of a model's columns."""


def encoder_score(checkpoint: Checkpoint, pairs: int | None) -> Score:
    """Retrieval and cosine against the original."""
    texts = read_pairs("evaluation", pairs)
    original = retrieve(checkpoint.model, checkpoint, texts)

    def score(call: Callable[..., object]) -> list[str]:
        reached = retrieve(call, checkpoint, texts)
        change, low, high = difference(original, reached, 10)
        near = float(cosine(original, reached).mean())
        return [f"{reached.recall(10):.3f}", f"{change:+.1%} ({low:+.1%} to {high:+.1%})", f"{near:.4f}"]

    return score


def decoder_score(checkpoint: Checkpoint, tokens: int) -> Score:
    """Perplexity, and its change."""
    pieces = windows(checkpoint, "evaluation", tokens)
    base = losses(checkpoint.model, checkpoint, pieces)
    return lambda call: perplexity_change(base, losses(call, checkpoint, pieces))


def quality_table(
    model: str, checkpoint: Checkpoint, budgets: Sequence[float], data: Sequence[dict[str, object]], score: Score
) -> str:
    """Every method at every budget, as Markdown."""
    heads = ("bytes allowed", "fitted to", "in factors", "bytes of all weights", *HEADS[model], "s")
    lines = [f"| {' | '.join(heads)} |", "|---:|---" + "|---:" * (len(heads) - 2) + "|"]
    whole = lissom.optimize(checkpoint.model, checkpoint.example_inputs, checks="structural").program
    lines.append(f"| all | | | 1.000 | {' | '.join(score(whole))} | |")
    print(lines[-1], file=sys.stderr, flush=True)
    for budget in budgets:
        for name, options in WAYS.items():
            program, seconds = optimized(checkpoint, f"low-rank{{budget={budget:g},round_to=16{options}}}", data)
            size = program.parameter_bytes / whole.parameter_bytes
            cells = (f"{budget:.0%}", name, str(factored(program)), f"{size:.3f}", *score(program), f"{seconds:.0f}")
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


def factored(program: Program) -> int:
    """The number of weights replaced by two factors."""
    return sum(name.endswith("weight_v") for name in program.weights())


def latencies(checkpoint: Checkpoint, ranks: Sequence[int], seconds: float) -> dict[str, list[float]]:
    """The time of a call at each rank relative to the dense program, by shape; factors are from the weights alone."""
    whole = lissom.compile(checkpoint.model, checkpoint.example_inputs, checks="structural")
    ratios: dict[str, list[float]] = {f"{rows}x{tokens}": [] for rows, tokens in SHAPES}
    ratios["weights, bytes"] = []
    for rank in ranks:
        fast = lissom.compile(
            checkpoint.model,
            checkpoint.example_inputs,
            passes=f"low-rank{{rank={rank},whiten=false}}",
            checks="structural",
            goal=None,
        )
        for rows, tokens in SHAPES:
            given = timed_inputs("minilm", checkpoint, rows, tokens)
            ratios[f"{rows}x{tokens}"].append(latency_share(fast, whole, given, seconds))
        ratios["weights, bytes"].append(fast.program.parameter_bytes / whole.program.parameter_bytes)
        print(rank, {name: values[-1] for name, values in ratios.items()}, file=sys.stderr, flush=True)
    return ratios


def latency_table(ranks: Sequence[int], ratios: dict[str, list[float]]) -> str:
    """Relative times by rank, as Markdown."""
    lines = [f"| rank | {' | '.join(ratios)} |", "|---:" * (len(ratios) + 1) + "|"]
    lines += [
        f"| {rank} | {' | '.join(f'{values[index]:.2f}' for values in ratios.values())} |" for index, rank in enumerate(ranks)
    ]
    return "\n".join(lines) + "\n"


def draw(ranks: Sequence[int], ratios: dict[str, list[float]]) -> None:
    """Latency and bytes against rank."""
    figure, axis = subplots(figsize=(5, 3.4))
    for name, values in ratios.items():
        axis.plot(ranks, values, marker="o", linestyle="--" if "bytes" in name else "-", label=name)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xlabel("rank")
    axis.set_ylabel("share of the whole program's")
    axis.set_ylim(0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, FIGURE)


def main() -> None:
    """Measure, print, and with `--update` put the tables into the README."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=list(TITLES))
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS, help="fractions of the treated bytes")
    parser.add_argument("--pairs", type=int, help="evaluated synsets of MiniLM; all of them by default")
    parser.add_argument("--texts", type=int, default=2000, help="calibration texts of MiniLM; %(default)s by default")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens Gemma is evaluated on; %(default)s by default")
    parser.add_argument("--calibration", type=int, default=8192, help="tokens Gemma is calibrated on; %(default)s by default")
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS, help="ranks at which MiniLM is timed")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds per shape; %(default)s by default")
    parser.add_argument("--update", action="store_true", help="put the tables into benchmarks/README.md")
    options = parser.parse_args()
    checkpoint = load(options.model)
    encoder = options.model == "minilm"
    given = calibration_batches(checkpoint, options.texts) if encoder else decoder_batches(checkpoint, options.calibration)
    data: list[dict[str, object]] = [dict(batch) for batch in given]
    score = encoder_score(checkpoint, options.pairs) if encoder else decoder_score(checkpoint, options.tokens)
    sizes = f"{options.texts:,} calibration texts"
    if not encoder:
        sizes = f"{options.tokens:,} tokens evaluated, {options.calibration:,} for calibration"
    tables = {f"low-rank {options.model}": quality_table(options.model, checkpoint, options.budgets, data, score)}
    tables[f"low-rank {options.model}"] += f"\n{sizes}; {conditions()}.\n"
    if encoder and options.ranks:
        ratios = latencies(checkpoint, options.ranks, options.seconds)
        tables["low-rank latency"] = f"{latency_table(options.ranks, ratios)}\n{conditions()}.\n"
        if options.update:
            draw(options.ranks, ratios)
            tables["low-rank latency"] += "\n![latency and bytes against rank](low_rank.svg)\n"
    for name, table in tables.items():
        print(table)
        if options.update:
            put_table(name, table)


if __name__ == "__main__":
    main()
