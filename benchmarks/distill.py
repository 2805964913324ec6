"""What distillation wins back on all-MiniLM-L6-v2, at what speed, beside training the same program with PyTorch.

    python benchmarks/distill.py --minutes 10 --update

Each pipeline ends with `distill`, on 137,141 texts of WordNet in random order, and is measured before and after it. Recall is
of other synsets, as in quality.py. The speedup is the compiled program against our own exact one, at 32 rows of 128 tokens.
Where no pass quantizes, int8 comes on top at the end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from figures import save, subplots
from linear_attention import held_bytes
from quality import Embedder, Retrieval, Texts, conditions, difference, read_pairs, retrieve, training_batches
from readme import put_table

import lissom
from lissom.cli.bench.worker import peak_bytes
from lissom.compiler.ir.editor import CurvePoint
from lissom.compiler.ir.program import Program
from lissom.compiler.memory import give_back_memory
from lissom.frontends.models.huggingface import Checkpoint, load
from lissom.measure.timing import time_calls

RECOVER = "RECOVER"
"""Stands in a pipeline for the pass that trains."""
PIPELINES = (
    f"prune-layers{{keep=0.5}},{RECOVER}",
    f"prune-layers{{keep=0.5,criterion=linear-fit}},{RECOVER}",
    f"prune-layers{{keep=0.67}},prune-neurons{{keep=0.95}},{RECOVER}",
    f"prune-heads{{keep=0.75}},prune-neurons{{keep=0.5}},{RECOVER}",
    f"quantize{{scheme=int4-weight}},{RECOVER}",
)
ROWS, TOKENS, BATCH = 32, 128, 64
FIGURE = Path(__file__).with_name("distill.svg")
STEPS = 30
"""Steps of PyTorch's own training that are timed, after two that are not."""

Batches = list[dict[str, torch.Tensor]]
Recall = tuple[float, float, float, float]
"""recall@10, its change from the original, and the ends of the change's 95 % interval."""


def eager_speed(program: Program, batches: Batches) -> float:
    """Real tokens per second of training the program's module with PyTorch on the batches as they come."""
    module = program.trainable()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("embeddings" not in name)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad], lr=1e-6, fused=True
    )
    chosen, started, tokens = batches[: STEPS + 2], 0.0, 0
    for index, batch in enumerate(chosen):
        if index == 2:
            started, tokens = time.perf_counter(), 0
        optimizer.zero_grad()
        module(**batch).square().mean().backward()
        optimizer.step()
        tokens += int(batch["attention_mask"].sum())
    return tokens / (time.perf_counter() - started)


@dataclass(frozen=True)
class Setting:
    """What all pipelines share: the model, its batches and texts, the original's results, and its exact program."""

    checkpoint: Checkpoint
    model: Embedder
    batches: Batches
    texts: Texts
    original: Retrieval
    exact: lissom.CompiledModel


def compiled(setting: Setting, program: Program, passes: str = "exact") -> lissom.CompiledModel:
    """The program, compiled."""
    return lissom.compile(program, setting.checkpoint.example_inputs, passes=passes, checks="structural", goal=None)


@dataclass(frozen=True)
class Recovered:
    """What one pipeline gave.

    speedup: over the exact program. recalls: recall@10, its change and the change's interval, without and with recovery.
    quantized: speedup and recall with int8 on top; None where a pass quantizes.
    speeds: tokens a second of `distill` and of PyTorch.
    """

    passes: str
    speedup: float
    recalls: tuple[Recall, Recall]
    quantized: tuple[float, Recall] | None
    curve: Sequence[CurvePoint]
    speeds: tuple[float, float]

    @property
    def line(self) -> str:
        """The row of the table."""
        cells = [f"`{self.passes}`", f"{self.speedup:.2f}", *map(shown, self.recalls)]
        cells += ["", ""] if self.quantized is None else [f"{self.quantized[0]:.2f}", shown(self.quantized[1])]
        cells += [str(self.curve[-1].step), *(f"{speed:,.0f}" for speed in self.speeds)]
        return f"| {' | '.join(cells)} |"


def shown(recall: Recall) -> str:
    """A cell of the table."""
    value, change, low, high = recall
    return f"{value:.3f}, {change:+.1%} ({low:+.1%} to {high:+.1%})"


def recovered(setting: Setting, passes: str, recovery: str) -> Recovered:
    """Run one pipeline, and measure the program that recovery begins with and the one it ends with."""
    programs, retrievals, held, peaks = list[Program](), list[Retrieval](), list[int](), list[int]()

    def recall_10(program: Program) -> float:
        """Measured at the start and after every lossy pass; with the peak memory since the last time, and that held now."""
        peaks.append(peak_bytes())
        programs.append(program)
        retrievals.append(retrieve(program, setting.checkpoint, setting.texts))
        give_back_memory()
        held.append(held_bytes())
        return retrievals[-1].recall(10)

    optimized = lissom.optimize(
        setting.model,
        setting.checkpoint.example_inputs,
        passes=passes.replace(RECOVER, recovery),
        data=setting.batches,
        checks="structural",
        metric=recall_10,
    )
    (step,) = (step for step in optimized.report.history.steps if step.curve)
    added = peaks[-1] - held[-2]
    times = added / programs[-2].parameter_bytes
    more = f"training took {added >> 20} MiB more than before, {times:.1f} times the student's weights"
    print(*step.notes, more, sep="\n", flush=True)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in setting.batches) / len(setting.batches)
    last, quantized = step.curve[-1], None
    if "quantize" not in passes:
        int8 = compiled(setting, optimized.program, "quantize")
        quantized = (speedup(setting, int8), recall(setting, retrieve(int8, setting.checkpoint, setting.texts)))
    return Recovered(
        passes.replace(RECOVER, "distill"),
        speedup(setting, compiled(setting, optimized.program)),
        (recall(setting, retrievals[-2]), recall(setting, retrievals[-1])),
        quantized,
        step.curve,
        (tokens * last.step / last.seconds, eager_speed(programs[-2], setting.batches)),
    )


def recall(setting: Setting, retrieval: Retrieval) -> Recall:
    """recall@10 beside the original's."""
    return (retrieval.recall(10), *difference(setting.original, retrieval, 10))


def draw(runs: Sequence[Recovered]) -> None:
    """The loss over the minutes, and recall over speed with and without recovery."""
    figure, (losses, qualities) = subplots(1, 2, figsize=(10, 3.8))
    for run in runs:
        minutes = [point.seconds / 60 for point in run.curve]
        (line,) = losses.plot(minutes, [point.held_out for point in run.curve], label=run.passes)
        for fill, (_, change, low, high) in zip(("white", line.get_color()), run.recalls, strict=True):
            spread = [[100 * (change - low)], [100 * (high - change)]]
            qualities.errorbar(run.speedup, 100 * change, spread, marker="o", color=line.get_color(), mfc=fill, capsize=3)
        ends = [100 * change for _, change, _, _ in run.recalls]
        qualities.plot([run.speedup] * 2, ends, color=line.get_color(), linestyle=":")
    losses.set(xlabel="minutes", ylabel="loss on held-out texts", yscale="log")
    losses.legend(fontsize=7)
    qualities.set(xlabel="times faster than the exact program", ylabel="change of recall@10, %", title="hollow: not recovered")
    for axes in (losses, qualities):
        axes.grid(alpha=0.3)
    save(figure, FIGURE)


def speedup(setting: Setting, fast: lissom.CompiledModel) -> float:
    """How much faster it is than the exact program."""
    inputs = setting.checkpoint.encode(["a sentence " * TOKENS] * ROWS, TOKENS)
    timings = time_calls({"exact": lambda: setting.exact(**inputs), "fast": lambda: fast(**inputs)}, 10.0)
    return timings["exact"].median_ms / timings["fast"].median_ms


def prepared(pairs: int | None = None) -> Setting:
    """The setting. pairs: the synsets to evaluate on; all of them by default."""
    checkpoint = load("minilm")
    model = Embedder(checkpoint.model).eval()
    batches, texts = training_batches(checkpoint, BATCH), read_pairs("evaluation", pairs)
    original = retrieve(model, checkpoint, texts)
    exact = lissom.compile(model, checkpoint.example_inputs)
    return Setting(checkpoint, model, batches, texts, original, exact)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of each distillation; %(default)s by default")
    parser.add_argument("--options", default="", help="further options of distill, e.g. learning_rate=0.001")
    parser.add_argument("--pairs", type=int, help="evaluated synsets; all of them by default")
    parser.add_argument("--passes", nargs="*", default=list(PIPELINES), help=f"pipelines to measure, {RECOVER} where to train")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    options = parser.parse_args()
    setting = prepared(options.pairs)
    original = setting.original
    lines = [
        "| passes | × faster | recall@10 without recovery | with `distill` | × with int8 on top | recall@10 | steps "
        "| tokens/s | PyTorch's |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| none | 1 | {original.recall(10):.3f} | | | | | | |",
    ]
    recovery = f"distill{{minutes={options.minutes:g}{options.options and ','}{options.options}}}"
    runs = list[Recovered]()
    for passes in options.passes:
        runs.append(recovered(setting, passes, recovery))
        print(runs[-1].line, flush=True)
    lines += [run.line for run in runs]
    about = f"`{recovery}`, batches of {BATCH}, {len(original.ranks):,} synsets."
    text = "\n".join(lines) + f"\n\n{about} {conditions()}.\n"
    print(text)
    if options.update:
        put_table("distillation", text, by_processor=True)
        draw(runs)


if __name__ == "__main__":
    main()
