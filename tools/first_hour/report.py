"""The report: failures first, then a section a step, written again after each task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.gpu_rows import BATCHES, ROWS, TITLES
from tools.first_hour.cards import find_card
from tools.first_hour.device import PRETENDED_CARD
from tools.first_hour.predictions import digits
from tools.first_hour.results import Result, Results, write
from tools.first_hour.tasks import STEPS, Step

_PRETENDED = """**Everything here is pretended**: there was no GPU, models are tiny, and values were computed on the CPU. It
shows that the steps run. Nothing was timed; predictions are by roofline, of the real models.
"""
_TABLE = (
    "| model | dtype | engine | batch | ms (middle half) | cosine to float32 | memory, GB |\n|---|---|---|---:|---:|---:|---:|"
)


def write_report(results: Results, card: str, pretend: bool) -> None:
    """Write report.md into the directory of the results."""
    sections = [f"# The first hour on {card}\n", *([_PRETENDED] if pretend else []), _failures(results)]
    for step in STEPS:
        found = results.of(step.name)
        left = [task.name for task in step.tasks(pretend) if results.find(step.name, task.name) is None]
        sections.append(_section(step, found, left, results, card))
    write(results.folder / "report.md", "\n".join(sections))


def problems(result: Result) -> list[str]:
    """A sentence for each fault that a task found, or that ended it."""
    if result.status != "done":
        return [f"{result.task}: {result.status}: {result.error}"]
    if result.step == "operators":
        return [f"{case['case']}: {_how_wrong(case)}" for case in result.data if not case["ok"]]
    if result.step == "tests":
        return [f"{result.task}::{failure['test']}: {failure['error']}" for failure in result.data["failures"]]
    if result.step in ("first-rows", "benchmarks"):
        return [f"{result.task}, batch {row['batch']}: {row['failed']}" for row in result.data if row["failed"]]
    return []


def _how_wrong(case: Mapping[str, Any]) -> str:
    if "error" not in case:
        return str(case["how"])
    error = case["error"] if isinstance(case["error"], str) else f"{case['error']:.2g}"
    return f"relative error {error}, and {case['allowed']:.2g} is allowed"


def _failures(results: Results) -> str:
    lines = [
        f"- **{step.name}** {_plain(text)}" for step in STEPS for found in results.of(step.name) for text in problems(found)
    ]
    return "\n".join([f"## Failures: {len(lines)}\n", *(lines or ["None in what has run."]), ""])


def _section(step: Step, found: list[Result], left: list[str], results: Results, card: str) -> str:
    done = sum(result.status == "done" for result in found)
    lines = [
        f"## {step.about}\n",
        f"{done} of {len(found) + len(left)} tasks are done, in {sum(r.seconds for r in found):.0f} s.\n",
    ]
    finished = [result for result in found if result.status == "done"]
    if finished and step.name in _BODIES:
        lines += _BODIES[step.name](finished)
    if step.name == "predictions" and finished:
        lines += _beside_predictions(finished, results, card)
    if left:
        lines.append(f"\nNot run yet: {', '.join(left[:8])}{f' and {len(left) - 8} more' if len(left) > 8 else ''}.")
    return "\n".join([*lines, ""])


def _environment(found: list[Result]) -> Iterable[str]:
    facts = dict(found[0].data)
    notes = facts.pop("notes")
    yield "| | |\n|---|---|"
    yield from (f"| {name} | {_plain(str(value))} |" for name, value in facts.items())
    yield ""
    yield from (f"- {note}" for note in notes)


def _operators(found: list[Result]) -> Iterable[str]:
    yield "| kind | cases | wrong | largest error / allowed | not by its own product |\n|---|---:|---:|---:|---|"
    for result in found:
        ratios = [case["error"] / case["allowed"] for case in result.data if isinstance(case.get("error"), float)]
        wrong = sum(not case["ok"] for case in result.data)
        others = [case for case in result.data if case["ok"] and case.get("how", "product").split()[0] != "product"]
        told = "; ".join(dict.fromkeys(f"{case['case']} ({str(case['how'])[:60]})" for case in others))
        yield f"| {result.task} | {len(result.data)} | {wrong} | {max(ratios, default=0):.2f} | {_plain(told[:400])} |"


def _tests(found: list[Result]) -> Iterable[str]:
    yield "| file | passed | failed | skipped |\n|---|---:|---:|---:|"
    for result in found:
        why = "; ".join(result.data["why_skipped"])
        skipped = f"{result.data['skipped']}{f' ({_plain(why[:200])})' if why else ''}"
        yield f"| {result.task} | {result.data['passed']} | {len(result.data['failures'])} | {skipped} |"


def _rows(found: list[Result]) -> Iterable[str]:
    order = {str(row): number for number, row in enumerate(ROWS)}
    yield _TABLE
    for result in sorted(found, key=lambda result: order[result.task]):
        model, dtype, engine = result.task.split()
        for row in result.data:
            start = f"| {model} | {dtype} | {TITLES[engine]} | {row['batch']} |"
            if row["failed"]:
                yield f"{start} failed: {_plain(row['failed'])} | | |"
            elif row["median"] is None:
                yield f"{start} pretended, not timed | {row['cosine']:.6f} | |"
            else:
                times = f"{row['median']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
                yield f"{start} {times} | {row['cosine']:.6f} | {row['memory'] / 1e9:.2f} |"


def _profiles(found: list[Result]) -> Iterable[str]:
    for result in found:
        yield f"\n{result.task}, batch 8:\n"
        timed = bool(result.data) and "ms" in result.data[0]
        yield (
            "| kernel | launches | ms of a call |\n|---|---:|---:|" if timed else "| pretended: operator | calls |\n|---|---:|"
        )
        for kernel in result.data:
            figures = [f"{kernel['launches']:g}", *([f"{kernel['ms']:.3f}"] if timed else [])]
            yield f"| `{_plain(kernel['kernel'][:90])}` | {' | '.join(figures)} |"


def _beside_predictions(found: list[Result], results: Results, card: str) -> Iterable[str]:
    """What was measured beside what was predicted; the predictions alone for the pretended GPU."""
    known = find_card(card)
    if known is None and card != PRETENDED_CARD:
        yield f"No published figures of '{card}' are listed in tools/first_hour/cards.py, so nothing is predicted for it."
        return
    measured = {
        (result.task, row["batch"]): row["median"]
        for step in ("first-rows", "benchmarks")
        for result in results.of(step)
        if result.status == "done"
        for row in result.data
    }
    shown = known or "H100 SXM"
    yield f"By roofline, for {shown}; predictions, not measurements.\n"
    yield "| row | batch | predicted, ms | measured, ms | measured / predicted |\n|---|---:|---:|---:|---:|"
    for result in found:
        for row, by_card in result.data.items():
            for batch, predicted in zip(BATCHES, by_card[shown], strict=True):
                taken = measured.get((row, batch))
                if predicted is not None and (taken is not None or known is None):
                    ratio = ("not timed", "") if taken is None else (f"{taken:.2f}", f"{taken / predicted:.2f}")
                    yield f"| {row} | {batch} | {digits(predicted)} | {' | '.join(ratio)} |"


_BODIES = {
    "environment": _environment,
    "operators": _operators,
    "first-rows": _rows,
    "tests": _tests,
    "benchmarks": _rows,
    "profiles": _profiles,
}


def _plain(text: str) -> str:
    """On one line, and without what would end a cell of a table."""
    return " ".join(text.split()).replace("|", "/")
