"""Quality, latency and bytes against the fraction kept, for every pruning pass, without retraining: docs/curves.md.

    python benchmarks/curves.py minilm
    python benchmarks/curves.py gemma3-270m
    python benchmarks/curves.py --draw

Each point is added to curves.json as soon as it is measured, and a run continues where the last one stopped. Quality is that of
quality.py. Latency is relative to our own unpruned program, the two timed in turn in one process, so that the ratio holds on a
busy machine. Bytes are those of the weights in an artifact.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from figures import save, subplots
from quality import (
    calibration_batches,
    conditions,
    cosine,
    decoder_batches,
    difference,
    latency_share,
    perplexity,
    read_pairs,
    retrieve,
    timed_inputs,
)

import lissom
from lissom.artifacts.weights import stored_bytes
from lissom.frontends.models.huggingface import Checkpoint, load
from lissom.io.files import write_whole
from lissom.runtime.compiled_model import CompiledModel

HERE = Path(__file__).parent
RECORDS = HERE / "curves.json"
PAGE = HERE.parent / "docs" / "curves.md"
ELIMINATE = "eliminate-dead"
PASSES = {
    "minilm": ("prune-heads", "prune-neurons", "prune-heads+prune-neurons", "prune-layers", "prune-hidden", "sparsify"),
    "gemma3-270m": ("prune-heads", "prune-neurons", "prune-layers", "sparsify"),
}
KEEPS = {"minilm": (0.9, 0.75, 0.5), "gemma3-270m": (0.75, 0.5)}
TEXTS, PAIRS = 4000, 2000
"""For MiniLM: the number of calibration texts, and of evaluated synsets."""
SHAPES = {"minilm": (32, 128), "gemma3-270m": (1, 128)}
OPTIONS = {"sparsify": ",criterion=sparsegpt"}
TITLES = {"minilm": "all-MiniLM-L6-v2", "gemma3-270m": "Gemma 3 270M"}


@dataclass(frozen=True)
class Point:
    """One pass, or two, at one fraction kept.

    quality: by name; `recall@10` and `cosine`, or `perplexity`. latency, size: relative to the unpruned program.
    """

    model: str
    passes: str
    keep: float
    quality: dict[str, float]
    latency: float
    size: float
    seconds: float
    machine: str


def read_points() -> list[Point]:
    """The points measured so far."""
    return [Point(**fields) for fields in json.loads(RECORDS.read_text(encoding="utf-8"))] if RECORDS.exists() else []


def pipeline(passes: str, keep: float) -> str:
    """The passes as text, followed by the removal of dead units."""
    chosen = [f"{name}{{keep={keep:g}{OPTIONS.get(name, '')}}}" for name in passes.split("+")]
    return ",".join([*chosen, ELIMINATE])


def missing(model: str, points: Sequence[Point]) -> Iterator[tuple[str, float]]:
    """The points not measured yet, the largest fraction of every pass first."""
    known = {(point.passes, point.keep) for point in points if point.model == model}
    for keep in KEEPS[model]:
        for passes in PASSES[model]:
            if (passes, keep) not in known:
                yield passes, keep


def measure(model: str) -> None:
    """Measure the missing points of a model's curves."""
    checkpoint = load(model)
    rows, tokens = SHAPES[model]
    data = calibration_batches(checkpoint, TEXTS) if model == "minilm" else decoder_batches(checkpoint)
    timed = timed_inputs(model, checkpoint, rows, tokens)
    whole = lissom.compile(checkpoint.model, checkpoint.example_inputs)
    size = stored_bytes(whole.program)
    score = scorer(model, checkpoint)
    print(f"{model}: unpruned {score(None)}", file=sys.stderr)
    for passes, keep in missing(model, read_points()):
        started = time.perf_counter()
        pruned = lissom.compile(
            checkpoint.model,
            checkpoint.example_inputs,
            passes=pipeline(passes, keep),
            data=data,
            checks="structural",
            goal=None,
        )
        seconds = time.perf_counter() - started
        latency = latency_share(pruned, whole, timed, 5.0)
        point = Point(model, passes, keep, score(pruned), latency, stored_bytes(pruned.program) / size, seconds, conditions())
        print(point, file=sys.stderr)
        write_whole(RECORDS, json.dumps([asdict(measured) for measured in (*read_points(), point)], indent=1) + "\n")


def scorer(model: str, checkpoint: Checkpoint) -> Callable[[CompiledModel | None], dict[str, float]]:
    """Returns the function that scores a compiled model, or the original for None."""
    if model != "minilm":
        return lambda compiled: {"perplexity": perplexity(compiled or checkpoint.model, checkpoint)}
    texts = read_pairs("evaluation", PAIRS)
    original = retrieve(checkpoint.model, checkpoint, texts)

    def score(compiled: CompiledModel | None) -> dict[str, float]:
        reached = retrieve(compiled, checkpoint, texts) if compiled else original
        change, low, high = difference(original, reached, 10)
        near = float(cosine(original, reached).mean())
        return {"recall@10": reached.recall(10), "change": change, "low": low, "high": high, "cosine": near}

    return score


def draw(model: str, points: Sequence[Point], path: Path) -> None:
    """Three plots side by side: quality, latency and bytes against the fraction kept."""
    figure, axes = subplots(1, 3, figsize=(12, 3.6))
    quality = "recall@10" if model == "minilm" else "perplexity"
    for passes in PASSES[model]:
        chosen = sorted((point for point in points if point.passes == passes), key=lambda point: point.keep)
        keeps = [point.keep for point in chosen]
        for axis, values in zip(
            axes,
            ([p.quality[quality] for p in chosen], [p.latency for p in chosen], [p.size for p in chosen]),
            strict=True,
        ):
            axis.plot(keeps, values, marker="o", label=passes)
    if model != "minilm":
        axes[0].set_yscale("log")
    for axis, title in zip(axes, (quality, "latency, share of unpruned", "bytes, share of unpruned"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("keep")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save(figure, path)


def page(points: Sequence[Point]) -> str:
    """The page: for each model its figure and its table."""
    lines = [
        "<!-- Made by benchmarks/curves.py. -->\n",
        "# What pruning costs and gains\n",
        "Quality, latency and bytes against the fraction kept, without retraining. Dead units are removed after each pass.",
        "`sparsify` takes `criterion=sparsegpt`; all others their defaults. Quality is described in `benchmarks/quality.py`;",
        "latency is that of the CPU backend relative to our own unpruned program, the two run in turn; bytes are those of",
        "the weights in an artifact. Passes that use data had 4,000 calibration texts, or 8,192 tokens for the decoder.\n",
    ]
    for model, title in TITLES.items():
        chosen = [point for point in points if point.model == model]
        if not chosen:
            continue
        rows, tokens = SHAPES[model]
        lines += [f"## {title}, latency at {rows} x {tokens}\n", f"![{title}](curves-{model}.svg)\n"]
        head = "recall@10, change (95 %) | cosine" if model == "minilm" else "perplexity"
        lines += [
            f"| passes | keep | {head} | latency | bytes | s |",
            "|---|---:|---:|" + "---:|" * (4 if model == "minilm" else 3),
        ]
        for point in sorted(chosen, key=lambda measured: (PASSES[model].index(measured.passes), -measured.keep)):
            quality = point.quality
            if model == "minilm":
                cells = f"{quality['change']:+.1%} ({quality['low']:+.1%} to {quality['high']:+.1%}) | {quality['cosine']:.4f}"
            else:
                cells = f"{quality['perplexity']:.1f}"
            gains = f"{point.latency:.2f} | {point.size:.2f} | {point.seconds:.0f}"
            lines.append(f"| `{point.passes}` | {point.keep:g} | {cells} | {gains} |")
        lines.append(f"\n{chosen[-1].machine}.\n")
    return "\n".join(lines)


def main() -> None:
    """Measure, then draw all points."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", choices=list(TITLES), help="whose curves to measure")
    parser.add_argument("--draw", action="store_true", help="draw the measured points, and measure nothing")
    options = parser.parse_args()
    if options.model and not options.draw:
        measure(options.model)
    points = read_points()
    for model in TITLES:
        chosen = [point for point in points if point.model == model]
        if chosen:
            draw(model, chosen, PAGE.parent / f"curves-{model}.svg")
    write_whole(PAGE, page(points))


if __name__ == "__main__":
    main()
