"""Two recipes of recovery on all-MiniLM-L6-v2, over the minutes and over speed, for the pages of docs/recipes/.

    python benchmarks/recipes.py
    python benchmarks/recipes.py --draw

Each pipeline is added to recipes.json as soon as it is measured, and a run continues where the last one stopped. Texts, recall
and speed are those of distill.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from distill import Recall, Setting, compiled, prepared, recall, shown, speedup
from figures import save, subplots
from quality import conditions, retrieve

import lissom
from lissom.compiler.ir.program import Program
from lissom.io.files import write_whole

HERE = Path(__file__).parent
RECORDS = HERE / "recipes.json"
PAGES = HERE.parent / "docs" / "recipes"
_LAYERS = "prune-layers{{keep={keep},criterion=linear-fit}},distill{{minutes={minutes},batch=64,learning_rate=0.001}}"
_WIDTHS = "prune-heads{{keep={keep}}},prune-neurons{{keep={keep}}},distill{{minutes={minutes},batch=64}}"
STAGES = 4
GRADUAL = ",".join([_WIDTHS.format(keep=0.84, minutes=1.5)] * STAGES)
PIPELINES = {
    "layer_reduction": (
        *(_LAYERS.format(keep=0.5, minutes=minutes) for minutes in (1, 2.5, 6)),
        *(_LAYERS.format(keep=keep, minutes=2.5) for keep in (0.67, 0.33, 0.83)),
    ),
    "gradual_pruning": (
        GRADUAL,
        _WIDTHS.format(keep=0.5, minutes=6),
        _WIDTHS.format(keep=0.7, minutes=3),
    ),
}
"""By page. 0.84 four times is 0.5, and twice 0.7."""
TITLES = {"layer_reduction": "Layer reduction", "gradual_pruning": "Gradual pruning"}


@dataclass(frozen=True)
class Stage:
    """A training pass of a pipeline.

    minutes: all training of the pipeline up to its end. speedup: over the exact program. before, after: recall@10, its change
    and the ends of the change's interval. curve: minutes and the held-out loss.
    """

    minutes: float
    speedup: float
    before: Recall
    after: Recall
    curve: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Measured:
    """A pipeline with its training passes, in order."""

    page: str
    passes: str
    stages: Sequence[Stage]
    machine: str


def read_measured() -> list[Measured]:
    """The pipelines measured so far."""
    if not RECORDS.exists():
        return []
    records = json.loads(RECORDS.read_text(encoding="utf-8"))
    return [Measured(**{**record, "stages": [Stage(**stage) for stage in record["stages"]]}) for record in records]


def measure() -> None:
    """Measure what was not measured yet."""
    setting = prepared()
    for page, pipelines in PIPELINES.items():
        for passes in pipelines:
            if all(passes != known.passes for known in read_measured()):
                measured = Measured(page, passes, list(stages(setting, passes)), conditions())
                print(rows(measured), flush=True)
                write_whole(RECORDS, json.dumps([asdict(one) for one in (*read_measured(), measured)], indent=1) + "\n")


def stages(setting: Setting, passes: str) -> Iterator[Stage]:
    """Run a pipeline, and measure the programs before and after each of its training passes."""
    programs = list[Program]()

    def kept(program: Program) -> float:
        """Keeps the program at the start and after every lossy pass; all count as equally good."""
        programs.append(program)
        return 0.0

    optimized = lissom.optimize(
        setting.model,
        setting.checkpoint.example_inputs,
        passes=passes,
        data=setting.batches,
        checks="structural",
        metric=kept,
    )
    steps = [step for step in optimized.report.history.steps if not step.exact]
    minutes = 0.0
    for step, (before, after) in zip(steps, pairwise(programs), strict=True):
        if not step.curve:
            continue
        print(*step.notes, sep="\n", flush=True)
        recalls = [recall(setting, retrieve(program, setting.checkpoint, setting.texts)) for program in (before, after)]
        curve = [(minutes + point.seconds / 60, point.held_out) for point in step.curve]
        minutes = curve[-1][0]
        yield Stage(minutes, speedup(setting, compiled(setting, after)), *recalls, curve)


def rows(measured: Measured) -> str:
    """The rows of the table, one a stage."""
    lines = list[str]()
    for number, stage in enumerate(measured.stages, 1):
        name = f"`{measured.passes}`" if measured.passes != GRADUAL else f"gradual, after {number} of {STAGES} steps"
        lines.append(f"| {name} | {stage.minutes:.1f} | {stage.speedup:.2f} | {shown(stage.before)} | {shown(stage.after)} |")
    return "\n".join(lines)


def draw(chosen: Sequence[Measured], path: Path) -> None:
    """The held-out loss and recall over the minutes, and recall over speed without and with recovery."""
    figure, (losses, minutes, speeds) = subplots(1, 3, figsize=(13, 3.9))
    for number, measured in enumerate(chosen):
        color = f"C{number}"
        label = "gradual" if measured.passes == GRADUAL else measured.passes.replace(",distill", ",\ndistill")
        points = [point for stage in measured.stages for point in stage.curve]
        losses.plot([at for at, _ in points], [loss for _, loss in points], color=color, label=label)
        for stage in measured.stages:
            for axes, at in ((minutes, stage.minutes), (speeds, stage.speedup)):
                _, change, low, high = (100 * value for value in stage.after)
                axes.errorbar(at, change, [[change - low], [high - change]], color=color, marker="o", capsize=3)
            _, change, *_ = (100 * value for value in stage.before)
            speeds.plot([stage.speedup] * 2, [change, 100 * stage.after[1]], color=color, linestyle=":")
            speeds.plot(stage.speedup, change, color=color, marker="o", mfc="white")
    losses.set(xlabel="minutes of training", ylabel="loss on held-out texts", yscale="log")
    losses.legend(fontsize=6)
    minutes.set(xlabel="minutes of training", ylabel="change of recall@10, %")
    speeds.set(xlabel="times faster than the exact program", ylabel="change of recall@10, %", title="hollow: not recovered")
    for axes in (losses, minutes, speeds):
        axes.grid(alpha=0.3)
    save(figure, path)


def put_page(page: str, chosen: Sequence[Measured]) -> None:
    """Draw the figure, and write the table into the page behind its mark."""
    draw(chosen, PAGES / f"{page}.svg")
    path = PAGES / f"{page}.md"
    mark = "<!-- Made by benchmarks/recipes.py. -->\n"
    text = path.read_text(encoding="utf-8").partition(mark)[0]
    lines = [
        f"![{TITLES[page]}]({page}.svg)\n",
        "| passes | minutes of training | × faster | recall@10 before the last training | after it |",
        "|---|---:|---:|---:|---:|",
        *map(rows, chosen),
        f"\n{chosen[-1].machine}.\n",
    ]
    write_whole(path, text + mark + "\n" + "\n".join(lines))


def main() -> None:
    """Measure, then write the pages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--draw", action="store_true", help="write the pages of what was measured, and measure nothing")
    if not parser.parse_args().draw:
        measure()
    for page in PIPELINES:
        if chosen := [measured for measured in read_measured() if measured.page == page]:
            put_page(page, chosen)


if __name__ == "__main__":
    main()
