"""The texts of a report's rows: sizes in one unit a column, short spellings, notes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lissom.compiler.pipeline.history import History, Size, Step

_LONGEST_PASS = 28
_OPTION = re.compile(r'(?:[^,\["]|\[[^\]]*\]|"[^"]*")+')


def is_shown(step: Step, before: Step | None, pipeline: str) -> bool:
    """True for the capture, lossy passes, passes that changed the program, and those of `pipeline` that could not.

    Args:
        pipeline: the text of the passes that were asked for; a backend's own come after them.
    """
    changed = step.rewritten or step.added or step.removed
    refused = step.skipped and f",{step.spelling}," in f",{pipeline},"
    return before is None or step.kind != "rewrite" or bool(changed or refused) or step.size != before.size


def short_spelling(spelling: str) -> str:
    """The text of a pass, shortened to fit into a row by leaving out options."""
    if len(spelling) <= _LONGEST_PASS:
        return spelling
    name, _, options = spelling.partition("{")
    text = f"{name}{{"
    for option in _OPTION.findall(options.removesuffix("}")):
        if len(text) + len(option) + 3 > _LONGEST_PASS:
            break
        text += f"{option},"
    return f"{text}…}}"


def effect(step: Step) -> str:
    """The effect of a step, or the reason it was reverted."""
    if step.index == 0:
        return ""
    return step.summary if step.reverted is None else f"reverted: {step.reverted.partition(': ')[0]}"


@dataclass(frozen=True)
class _Unit:
    """The unit of a column: its name, and its size in what is counted."""

    name: str
    scale: float

    @classmethod
    def of(cls, count: int, base: str) -> _Unit:
        """The largest unit not above `count`; the names end in `base`."""
        prefix, scale = next(((name, size) for name, size in _PREFIXES if count >= size), ("", 1.0))
        return cls(f"{prefix}{base}", scale)

    def text(self, count: int) -> str:
        """Three significant digits without exponent."""
        value = count / self.scale
        return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3))


@dataclass(frozen=True)
class Units:
    """The units of a report, chosen by the captured model."""

    bytes: _Unit
    flops: _Unit

    @classmethod
    def of(cls, size: Size) -> Units:
        return cls(_Unit.of(size.parameter_bytes, "B"), _Unit.of(size.flops, "FLOP"))

    def texts(self, size: Size) -> list[str]:
        """Nodes, bytes of weights and operations."""
        return [str(size.nodes), self.bytes.text(size.parameter_bytes), self.flops.text(size.flops)]


def changed_sizes(before: Step | None, step: Step, units: Units) -> list[str]:
    """The sizes of a step; unchanged numbers are left out."""
    sizes = units.texts(step.size)
    if before is None:
        return sizes
    return ["" if new == old else new for new, old in zip(sizes, units.texts(before.size), strict=True)]


def notes_of(steps: list[Step]) -> list[str]:
    """The notes, each with its pass, and the reasons for reverted passes; notes of the last step may be the backend's."""
    notes: list[str] = []
    for step in steps:
        named = f"{step.spelling.partition('{')[0]}: " if 0 < step.index < len(steps) - 1 else ""
        notes += [f"{named}{note}" for note in step.notes]
        notes += [] if step.reverted is None else [f"{step.spelling} was reverted: {step.reverted}"]
    return notes


def hidden_steps(count: int) -> list[str]:
    """A line on steps that the table leaves out."""
    return (
        [f"{count} more {'step' if count == 1 else 'steps'} changed nothing; report.full() or --full shows them"]
        if count
        else []
    )


def about_checks(history: History) -> str:
    """The checks of the steps, in words, and the time of all steps."""
    words = {
        "numeric": "outputs are equal before and after exact steps",
        "each": "every exact step ran beside the one before and gave equal outputs",
        "structural": "form and types were checked after every step, numbers were not",
        "off": "nothing was checked",
    }
    seconds = sum(step.seconds + step.check_seconds for step in history.steps)
    return f"checks: {history.checks} ({words[history.checks]}); {seconds:.1f} s in all"
