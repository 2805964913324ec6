"""docs/tradeoffs.md: the measured rows as tables, beside the survey's High, Medium and Low."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tradeoff_rows import MODELS, RANKS, TECHNIQUES, Technique

SURVEY = {
    "Pruning": ("High", "Medium", "High"),
    "Quantization": ("Medium", "High", "Medium"),
    "Distillation": ("Low", "Medium", "Low"),
}
"""The survey's table: memory savings, speedup, complexity."""
_COLUMNS = ("memory savings", "speed-up", "complexity")
_MEMORY, _SPEED, _COMPLEXITY = (0.2, 0.5), (1.25, 2.0), (3, 6)
"""From which value on a measurement counts as Medium, and as High."""
_ENOUGH = 0.95
"""The quality that a row must keep to stand for its technique."""
_INTRO = """<!-- Made by benchmarks/tradeoffs.py; change that instead. -->

# Trade-offs, measured

What every technique saves, gains and costs, alone and combined, on three models: an encoder, a decoder and a vision transformer. The survey that Lissom
follows rates three of them High, Medium or Low; [below](#beside-the-survey) that is compared with the measurements.

- *memory saved*: of the weights in an artifact, in a decoder of the weights and a KV cache of 512 tokens; on two ranks, of the weights of one rank.
- *speed-up*: over Lissom's own exact program in float32, the two called in turn in one process, so that it is the technique's alone. The exact program's
  own speed-up is over PyTorch. On two ranks: two processes of one thread against one.
- *quality kept*: all-MiniLM-L6-v2 looks up usage examples among glosses, and recall@10 counts, with a 95 % interval. Gemma's is the
  ratio of perplexities, before over after, with the standard error of the change. The vision transformer has random weights and no task: its quality is the cosine of the
  outputs' differences from their mean over pictures, which says how well the numbers are kept and nothing about accuracy.
- *compile*: seconds of the whole call, with capture, calibration, training and building.
- *needs*: data to calibrate or train on, and what hardware it takes to be faster. No row needs labels.
- *complexity*: options set, and lines a user writes: the call, a line for data, a command that starts ranks.

`goal=None` keeps every pass here; by default a pass that makes the program slower is taken back. No row but those with `distill` trains, and those train for a
minute at most: [Recovering quality](recovery.md) shows what more time wins back. `python benchmarks/tradeoffs.py --update` makes this page.
"""


def page(rows: Sequence[Any]) -> str:
    """The page of all rows, measured by `tradeoffs.py`."""
    lines = [_INTRO]
    for model, title in MODELS.items():
        lines += [f"## {title}\n", *_about(model, rows), _table(model, rows), ""]
    lines += ["## Beside the survey\n", *_compared(rows)]
    return "\n".join(lines)


def _about(model: str, rows: Sequence[Any]) -> Iterator[str]:
    """The machine, and the exact program's speed."""
    shape = {"minilm": "8 rows of 128 tokens", "gemma3-270m": "one token after 128", "vit": "four pictures"}[model]
    exact = next((row for row in rows if (row.model, row.technique) == (model, "exact")), None)
    if exact is not None:
        yield f"A call has {shape}. The exact program takes {exact.milliseconds:.3g} ms, and is {exact.faster:.2f} × as fast as PyTorch.\n"
        yield f"{exact.machine}.\n"
    else:
        yield f"A call has {shape}.\n"


def _table(model: str, rows: Sequence[Any]) -> str:
    """The techniques of one model."""
    found = {(row.model, row.technique): row for row in rows}
    lines = [
        "| technique | passes | memory saved | speed-up | quality kept | compile, s | needs | complexity |",
        "|---|---|---:|---:|---|---:|---|---|",
    ]
    section = ""
    for item in TECHNIQUES:
        if item.section != section:
            section = item.section
            lines.append(f"| **{section}** | | | | | | | |")
        passes = item.passes(model)
        if not passes:
            lines.append(f"| {item.name} | does not apply: {item.without} | | | | | | |")
            continue
        shown = "`shard{world_size=2},partition`" if passes == RANKS else f"`{passes.replace('|', '/')}`"
        options = item.options(model) + (passes == RANKS)
        complexity = f"{_counted(options, 'option')}, {_counted(item.lines, 'line')}"
        cells = _cells(found.get((model, item.name)))
        lines.append(f"| {item.name} | {shown} | {' | '.join(cells)} | {item.needs(model)} | {complexity} |")
    return "\n".join(lines)


def _cells(row: Any) -> list[str]:
    """The measured cells of a row."""
    if row is None:
        return ["not measured", "", "", ""]
    if row.failed:
        return [f"refused: {row.failed.replace('|', '/')[:200]}", "", "", ""]
    return [f"{row.saved:.0%}", f"{row.faster:.2f} ×", f"{row.kept:.1%}: {row.quality}", f"{row.seconds:.0f}"]


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")


def _compared(rows: Sequence[Any]) -> Iterator[str]:
    """The survey's ratings beside ours, and a sentence for each that differs."""
    yield (
        f"The survey rates memory savings, speed-up and complexity. A measurement counts as Medium from {_MEMORY[0]:.0%} of the memory or "
        f"{_SPEED[0]} × the speed on, as High from {_MEMORY[1]:.0%} or {_SPEED[1]:g} ×; as complexity count options and lines together, "
        f"Medium from {_COMPLEXITY[0]}, High from {_COMPLEXITY[1]}, and training makes it at least Medium. A technique is rated by the row that saves most, and by the row "
        f"that is fastest, of those that keep {_ENOUGH:.0%} of the quality; if none does, by the row that keeps most.\n"
    )
    yield f"| technique | model | {' | '.join(_COLUMNS)} |"
    yield "|---|---|---|---|---|"
    sentences: list[str] = []
    for name, ratings in SURVEY.items():
        yield f"| **{name}** | the survey | {' | '.join(ratings)} |"
        for model, title in MODELS.items():
            found = _ratings(name, model, rows)
            if found is None:
                yield f"| | {title} | not measured | | |"
                continue
            yield f"| | {title} | {' | '.join(f'{level}: {text}' for level, text, _ in found)} |"
            for column, rating, (level, text, reason) in zip(_COLUMNS, ratings, found, strict=True):
                if level != rating:
                    sentences.append(
                        f"- {name}, {column}, {title}: {level} where the survey says {rating}. {text.capitalize()}{reason}."
                    )
    if sentences:
        yield "\nWhere the measurement disagrees:\n"
        yield from sentences
    yield ""


def _ratings(name: str, model: str, rows: Sequence[Any]) -> list[tuple[str, str, str]] | None:
    """For each column of the survey: the level, the figure, and the reason for it."""
    measured = {row.technique: row for row in rows if row.model == model and not row.failed}
    members = [(item, measured[item.name]) for item in TECHNIQUES if item.survey == name and item.name in measured]
    if not members:
        return None
    good = [pair for pair in members if pair[1].kept >= _ENOUGH] or [max(members, key=lambda pair: pair[1].kept)]
    smallest = max(good, key=lambda pair: pair[1].saved)
    fastest = max(good, key=lambda pair: pair[1].faster)
    simplest = min(good, key=lambda pair: _effort(pair[0], model))
    effort = _effort(simplest[0], model)
    tables = measured["exact"].embeddings if "exact" in measured else 0.0
    level = max(_level(effort, _COMPLEXITY), "Medium" if simplest[0].training else "Low", key=("Low", "Medium", "High").index)
    return [
        (
            _level(smallest[1].saved, _MEMORY),
            f"{smallest[1].saved:.0%} by {smallest[0].name}, {smallest[1].kept:.0%} of the quality kept",
            f"; {tables:.0%} of the bytes are embedding tables, which it leaves as they are"
            if tables > 0.1 and name != "Quantization"
            else "",
        ),
        (
            _level(fastest[1].faster, _SPEED),
            f"{fastest[1].faster:.2f} × by {fastest[0].name}, {fastest[1].kept:.0%} of the quality kept",
            _speed_reason(model),
        ),
        (
            level,
            f"{_counted(simplest[0].options(model), 'option')} and {_counted(simplest[0].lines, 'line')} for {simplest[0].name}",
            "",
        ),
    ]


def _speed_reason(model: str) -> str:
    """What bounds the speed of a call."""
    if model == "gemma3-270m":
        return "; a step reads every weight once, so only fewer bytes make it faster"
    return ""


def _effort(item: Technique, model: str) -> int:
    return item.options(model) + item.lines


def _level(value: float, bounds: tuple[float, float]) -> str:
    """Low, Medium or High."""
    return "High" if value >= bounds[1] else "Medium" if value >= bounds[0] else "Low"
