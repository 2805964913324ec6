"""What distillation wins back on all-MiniLM-L6-v2, at what speed, beside training the original with PyTorch.

    python benchmarks/distill.py --minutes 5 --update

Each pipeline runs without recovery and with `distill` after it, on 3,400 glosses and usage examples of WordNet. Recall is of
other synsets, as in quality.py. The speedup is the compiled program against our own exact one, at 32 rows of 128 tokens.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from quality import Retrieval, Texts, calibration_batches, conditions, difference, read_pairs, retrieve
from readme import put_table

import lissom
from lissom.frontends.huggingface import Checkpoint, load
from lissom.inspect.timing import time_calls

PIPELINES = (
    "prune-layers{keep=0.5}",
    "prune-heads{keep=0.5},prune-neurons{keep=0.5}",
    "prune-heads{keep=0.25},prune-neurons{keep=0.25}",
    "quantize{scheme=int4-weight}",
)
ROWS, TOKENS, BATCH = 32, 128, 32
STEPS = 20
"""Steps of PyTorch's own training that are timed, after two that are not."""

Batches = list[dict[str, torch.Tensor]]


def real_tokens(batches: Batches) -> float:
    """The mean number of real tokens of a batch."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches) / len(batches)


def eager_speed(batches: Batches) -> float:
    """Real tokens per second of training the original's layers with PyTorch, its embeddings frozen as `distill` has them."""
    model = load("minilm").model
    for parameter in model.embeddings.parameters():  # pyright: ignore[reportAttributeAccessIssue]
        parameter.requires_grad_(False)
    learned = [item for item in model.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-6, fused=True)
    chosen = batches[:: max(len(batches) // (STEPS + 2), 1)][: STEPS + 2]
    started = 0.0
    for index, batch in enumerate(chosen):
        if index == 2:
            started = time.perf_counter()
        optimizer.zero_grad()
        model(**batch)[0].square().mean().backward()
        optimizer.step()
    return real_tokens(chosen[2:]) * (len(chosen) - 2) / (time.perf_counter() - started)


@dataclass(frozen=True)
class Setting:
    """What all pipelines share: the model, the texts, the original's results, and its exact program."""

    checkpoint: Checkpoint
    batches: Batches
    texts: Texts
    original: Retrieval
    exact: lissom.CompiledModel


def row(setting: Setting, passes: str, minutes: float) -> list[str]:
    """The cells of one pipeline: its speedup, and its recall without and with recovery."""
    checkpoint, batches = setting.checkpoint, setting.batches
    cells = [f"`{passes}`"]
    speed = ""
    for recovery in ("", f",distill{{minutes={minutes:g}}}"):
        found = lissom.optimize(
            checkpoint.model, checkpoint.example_inputs, passes=passes + recovery, data=batches, checks="structural"
        )
        change, low, high = difference(setting.original, (recalled := retrieve(found.program, checkpoint, setting.texts)), 10)
        cells.append(f"{recalled.recall(10):.3f}, {change:+.1%} ({low:+.1%} to {high:+.1%})")
        for curve in (step.curve for step in found.report.history.steps if step.curve):
            speed = f"{curve[-1].step} | {real_tokens(batches) * curve[-1].step / curve[-1].seconds:,.0f}"
    # The last of the two, with recovery.
    compiled = lissom.compile(found.program, checkpoint.example_inputs, checks="structural")
    inputs = checkpoint.encode(["a sentence " * TOKENS] * ROWS, TOKENS)
    timings = time_calls({"exact": lambda: setting.exact(**inputs), "found": lambda: compiled(**inputs)}, 10.0)
    cells.insert(1, f"{timings['exact'].median_ms / timings['found'].median_ms:.2f}")
    return [*cells, speed]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="of each distillation; %(default)s by default")
    parser.add_argument("--pairs", type=int, help="evaluated synsets; all of them by default")
    parser.add_argument("--passes", nargs="*", default=list(PIPELINES), help="pipelines to measure, one argument each")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    options = parser.parse_args()
    checkpoint = load("minilm")
    batches, texts = calibration_batches(checkpoint, 3400, BATCH), read_pairs("evaluation", options.pairs)
    original = retrieve(checkpoint.model, checkpoint, texts)
    exact = lissom.compile(checkpoint.model, checkpoint.example_inputs)
    setting = Setting(checkpoint, batches, texts, original, exact)
    plain = f"{eager_speed(batches):,.0f} (PyTorch training the original)"
    lines = [
        "| passes | × faster | recall@10 without recovery | with `distill` | steps | tokens/s |",
        "|---|---:|---:|---:|---:|---:|",
        f"| none | 1 | {original.recall(10):.3f} | | | {plain} |",
    ]
    for passes in options.passes:
        cells = row(setting, passes, options.minutes)
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    about = f"{options.minutes:g} minutes of distillation each, batches of {BATCH}, {len(original.ranks):,} synsets."
    text = "\n".join(lines) + f"\n\n{about} {conditions()}.\n"
    print(text)
    if options.update:
        put_table("distillation", text)


if __name__ == "__main__":
    main()
