"""docs/tradeoffs.md: the measured rows as tables, beside the survey's High, Medium and Low."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tradeoff_rows import MODELS, RANKS, TECHNIQUES, Row, Technique

COLUMNS = ("memory savings", "speed-up", "complexity")
SURVEY = {
    "Pruning": ("High", "Medium", "High"),
    "Quantization": ("Medium", "High", "Medium"),
    "Distillation": ("Low", "Medium", "Low"),
}
"""The survey's table: a rating for each of COLUMNS."""
LEVELS = ("Low", "Medium", "High")
MEMORY, SPEED, COMPLEXITY = (0.2, 0.5), (1.25, 2.0), (3, 6)
"""From which value on a measurement counts as Medium, and as High."""
ENOUGH = 0.95
"""The quality that a row must keep to stand for its technique."""
SHAPES = {"minilm": "8 rows of 128 tokens", "gemma3-270m": "one token after 128", "vit": "four pictures"}
REASONS = {
    ("Pruning", "memory savings"): "Pruning leaves embedding tables as they are",
    ("Pruning", "speed-up"): "How much can go at that quality decides",
    ("Pruning", "complexity"): "Removal is a rewrite of the graph: an option names the fraction that stays, whatever the model",
    ("Quantization", "memory savings"): "A weight in int8 or int4 takes a quarter or an eighth of the bytes of float32",
    ("Quantization", "speed-up"): "The products are faster; norms, softmax and embeddings between them are not",
    ("Quantization", "complexity"): "One option names the scheme",
    ("Distillation", "memory savings"): "Training changes no size: what is saved are the layers that were removed before it",
    ("Distillation", "speed-up"): "Training changes no speed: what is gained are the layers that were removed before it",
    ("Distillation", "complexity"): "It needs data like those of the task, and time to train",
}
"""Why a measurement may differ from the survey's rating."""
INTRO = """<!-- Made by benchmarks/tradeoffs.py; change that instead. -->

# Trade-offs, measured

What every technique saves, gains and costs, alone and combined, on three models: an encoder, a decoder and a vision
transformer. The survey that Lissom follows rates three of them High, Medium or Low; [below](#beside-the-survey) that is
compared with the measurements.

- *memory saved*: of the weights in an artifact; for a decoder of the weights and a KV cache of 512 tokens; on two ranks, of the
  weights of one rank.
- *speed-up*: over Lissom's own exact program in float32, the two called in turn in one process, so that it is the technique's
  alone. On two ranks: two processes of one thread each against one.
- *quality kept*: MiniLM looks up usage examples among glosses, and recall@10 counts, with a 95 % interval. Gemma's is the ratio
  of perplexities, before over after, with the standard error of the change. The vision transformer has random weights and no
  task: its quality is the mean cosine of its outputs to the original's, after the mean over all pictures is taken from both.
  That says how well the numbers are kept, and nothing about accuracy.
- *compile*: seconds of the whole call, with capture, calibration, training and building.
- *needs*: data to calibrate or train on, and what makes it fast. No row needs labels.
- *complexity*: options set, and lines a user writes: the call, a line for data, a command that starts ranks.

`goal=None` keeps every pass here; by default a pass that makes the program slower is taken back. Only rows with `distill`
train, for less than a minute: [Recovering quality](recovery.md) says what more time wins back. Rows of int4 are from before
its weights had zero points by default: `symmetric=true` gives them. This page is made by
`python benchmarks/tradeoffs.py --update`, which measures what is missing.
"""


@dataclass(frozen=True)
class Rating:
    """A measurement as the survey would rate it, and its figure in words."""

    level: str
    figure: str


def page(rows: Sequence[Row]) -> str:
    """The page of all rows, measured by `tradeoffs.py`."""
    lines = [INTRO]
    for model, title in MODELS.items():
        lines += [f"## {title}\n", *about(model, rows), *table(model, rows), "", *elsewhere(model, rows)]
    return "\n".join([*lines, "## Beside the survey\n", *beside_survey(rows)]) + "\n"


def about(model: str, rows: Sequence[Row]) -> Iterator[str]:
    """The timed call, the exact program's speed, and the machine."""
    yield f"A call has {SHAPES[model]}."
    exact = next((row for row in rows if (row.model, row.technique) == (model, "exact")), None)
    if exact is not None:
        tables = f" Embedding tables are {exact.embeddings:.0%} of its bytes." if exact.embeddings else ""
        yield f"The exact program takes {exact.milliseconds:.3g} ms, {exact.faster:.2f} × as fast as PyTorch.{tables}"
        yield f"\n{exact.machine}."
    yield ""


def table(model: str, rows: Sequence[Row]) -> Iterator[str]:
    """The techniques of one model."""
    by_technique = {(row.model, row.technique): row for row in rows}
    yield "| technique | passes | memory saved | speed-up | quality kept | compile, s | needs | complexity |"
    yield "|---|---|---:|---:|---|---:|---|---|"
    section = ""
    for technique in TECHNIQUES:
        if technique.section != section:
            section = technique.section
            yield f"| **{section}** | | | | | | | |"
        passes = technique.passes(model)
        if not passes:
            yield f"| {technique.name} | does not apply: {technique.without} | | | | | | |"
            continue
        shown = "shard{world_size=2},partition" if passes == RANKS else passes
        complexity = f"{counted(technique.options(model), 'option')}, {counted(technique.lines, 'line')}"
        figures = " | ".join(cells(by_technique.get((model, technique.name))))
        yield f"| {technique.name} | `{shown}` | {figures} | {technique.needs(model)} | {complexity} |"


def elsewhere(model: str, rows: Sequence[Row]) -> Iterator[str]:
    """The techniques that were measured on another machine than the exact program of the table, beside that one's own."""
    measured = [row for row in rows if row.model == model]
    usual = next((row.machine for row in measured if row.technique == "exact"), "")
    for machine in dict.fromkeys(row.machine for row in measured):
        if machine != usual:
            names = ", ".join(row.technique for row in measured if row.machine == machine)
            yield f"Measured on {machine}: {names}.\n"


def cells(row: Row) -> list[str]:
    """The measured cells of a row."""
    if row is None:
        return ["not measured", "", "", ""]
    if row.failed:
        return [f"refused: {row.failed.replace('|', '/')}", "", "", ""]
    return [f"{row.saved:.0%}", f"{row.faster:.2f} ×", f"{row.kept:.1%}: {row.quality}", f"{row.seconds:.0f}"]


def counted(count: int, word: str) -> str:
    """`1 line`, `2 lines`."""
    return f"{count} {word}" + ("" if count == 1 else "s")


def beside_survey(rows: Sequence[Row]) -> Iterator[str]:
    """The survey's ratings beside ours, and a sentence for each that differs."""
    yield f"A measurement counts as Medium from {MEMORY[0]:.0%} of the memory or {SPEED[0]} × the speed on, and as High from"
    yield f"{MEMORY[1]:.0%} or {SPEED[1]:g} ×. For complexity, options and lines count together: Medium from {COMPLEXITY[0]},"
    yield f"High from {COMPLEXITY[1]}; training makes it Medium at least. Of the rows of a technique that keep {ENOUGH:.0%}"
    yield "of the quality, the one that saves most, the fastest and the simplest count; if none does, the best.\n"
    yield f"| technique | model | {' | '.join(COLUMNS)} |"
    yield "|---|---|---|---|---|"
    rated = {(name, model): ratings(name, model, rows) for name in SURVEY for model in MODELS}
    for name, levels in SURVEY.items():
        yield f"| **{name}** | the survey | {' | '.join(levels)} |"
        for model, title in MODELS.items():
            measured = " | ".join(f"{rating.level}: {rating.figure}" for rating in rated[name, model])
            yield f"| | {title} | {measured or 'not measured | | '} |"
    yield ""
    for name, levels in SURVEY.items():
        for at, (column, level) in enumerate(zip(COLUMNS, levels, strict=True)):
            differing = {model: rated[name, model][at] for model in MODELS if rated[name, model]}
            parts = [f"{rating.level} on {MODELS[model]}" for model, rating in differing.items() if rating.level != level]
            if parts:
                yield f"- {name}, {column}: the survey says {level}, measured is {', '.join(parts)}. {REASONS[name, column]}."


def ratings(name: str, model: str, rows: Sequence[Row]) -> list[Rating]:
    """The rating of a technique in each of COLUMNS; empty where nothing was measured."""
    measured = {row.technique: row for row in rows if row.model == model and not row.failed}
    members = [
        (technique, measured[technique.name])
        for technique in TECHNIQUES
        if technique.survey == name and technique.name in measured
    ]
    if not members:
        return []
    good = [pair for pair in members if pair[1].kept >= ENOUGH] or [max(members, key=lambda pair: pair[1].kept)]
    technique, row = max(good, key=lambda pair: pair[1].saved)
    memory = Rating(level_of(row.saved, MEMORY), f"{row.saved:.0%} by {technique.name}, {row.kept:.0%} kept")
    technique, row = max(good, key=lambda pair: pair[1].faster)
    speed = Rating(level_of(row.faster, SPEED), f"{row.faster:.2f} × by {technique.name}, {row.kept:.0%} kept")
    technique, _ = min(good, key=lambda pair: effort(pair[0], model))
    level = level_of(effort(technique, model), COMPLEXITY)
    level = max(level, "Medium", key=LEVELS.index) if technique.training else level
    written = f"{counted(technique.options(model), 'option')}, {counted(technique.lines, 'line')} for {technique.name}"
    return [memory, speed, Rating(level, written)]


def effort(technique: Technique, model: str) -> int:
    """Options and lines together."""
    return technique.options(model) + technique.lines


def level_of(value: float, bounds: tuple[float, float]) -> str:
    """Low, Medium or High."""
    return LEVELS[sum(value >= bound for bound in bounds)]
