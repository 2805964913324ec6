"""The data of a report's page: every step, and the program after it as the difference to the step before.

Lines of programs are records: the number of the text between the names, of the cost and of the origin (-1 without), the name of
the node that it replaces (-1 if none), then the names. `lines` of a step lists stretches of three numbers each: 0, a start and
a length in the lines of the step before; or 1, the first of consecutive records, and their count. None means the same lines.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from lissom.compiler.pipeline.history import History, NodeFacts, Step
from lissom.inspect.hot_layers import LayerTimes
from lissom.inspect.identical_layers import identical_layers
from lissom.inspect.lines import Line
from lissom.inspect.node_errors import NodeErrors

VERSION = 1
Item = TypeVar("Item")


def page_data(
    title: str, history: History, times: LayerTimes | None, errors: NodeErrors | None, missing: Sequence[str]
) -> dict[str, object]:
    """The content of the page, ready for `json.dumps`.

    Args:
        missing: sentences on what the report does not have.
    """
    tables = _Tables()
    steps: list[dict[str, object]] = []
    before: list[int] = []
    for index, (step, text) in enumerate(zip(history.steps, history.texts, strict=True)):
        lines = [Line.of(line) for line in text.split("\n")]
        facts = history.facts_of(index)
        records = [tables.record(line, facts.get(line.defines)) for line in lines]
        fold = tables.fold(text, lines)
        steps.append(_step(step) | {"lines": None if records == before else _stretches(before, records), "fold": fold})
        before = records
    return {
        "version": VERSION,
        "title": title,
        "pipeline": history.pipeline,
        "checks": history.checks,
        "missing": list(missing),
        "times": None if times is None else _times(times),
        "errors": None if errors is None else _errors(errors),
        "steps": steps,
        **tables.to_json(),
    }


def _times(times: LayerTimes) -> dict[str, object]:
    return {"title": times.title, "nodes": {f"%{name}": milliseconds for name, milliseconds in times.nodes.items()}}


def _errors(errors: NodeErrors) -> dict[str, object]:
    """The errors of nodes, and the softmax mass that attentions lost, to three digits."""
    lost = {name: 1 - mass for name, mass in errors.kept_mass.items()}
    return {
        key: {f"%{name}": _finite(float(f"{value:.3g}")) for name, value in values.items()}
        for key, values in (("nodes", errors.nodes), ("lost", lost))
    }


def _step(step: Step) -> dict[str, object]:
    """The figures of a step; skipped places by reason."""
    skipped: dict[str, list[list[str]]] = {}
    for skip in step.skipped:
        skipped.setdefault(skip.reason, []).append([skip.node, skip.place])
    size = step.size
    return {
        "spelling": step.spelling,
        "about": step.about,
        "kind": step.kind,
        "summary": step.summary if step.index else "the model as it was captured",
        "seconds": round(step.seconds, 4),
        "checked": round(step.check_seconds, 4),
        "size": [size.nodes, size.parameters, size.parameter_bytes, size.flops],
        "added": step.added,
        "removed": step.removed,
        "rewritten": step.rewritten,
        "skipped": list(skipped.items()),
        "error": _finite(step.relative_error),
        "cosine": _finite(step.cosine),
        "metric": _finite(step.metric),
        "notes": list(step.notes),
        "reverted": step.reverted,
        "perSite": step.per_site,
        "heldOut": [_finite(step.curve[at].held_out) for at in (0, -1)] if step.curve else None,
    }


def _finite(figure: float | None) -> float | None:
    """The figure as JSON can hold it: the largest number for infinity, None for NaN."""
    if figure is None or math.isnan(figure):
        return None
    return max(-sys.float_info.max, min(figure, sys.float_info.max))


def _stretches(before: Sequence[int], records: Sequence[int]) -> list[int]:
    """A list of records as stretches of the list before it and of new records."""
    places = {record: place for place, record in enumerate(before)}
    stretches: list[list[int]] = []
    for record in records:
        source, start = (0, places[record]) if record in places else (1, record)
        last = stretches[-1] if stretches else [2, 0, 0]
        if last[0] == source and last[1] + last[2] == start:
            last[2] += 1
        else:
            stretches.append([source, start, 1])
    return [number for stretch in stretches for number in stretch]


@dataclass
class _Tables:
    """Tables of everything that repeats; each entry is there once, and others name it by its number."""

    names: dict[str, int] = field(default_factory=dict[str, int])
    pieces: dict[tuple[str, ...], int] = field(default_factory=dict["tuple[str, ...]", int])
    costs: dict[tuple[int, ...], int] = field(default_factory=dict["tuple[int, ...]", int])
    origins: dict[tuple[str, str, tuple[str, ...]], int] = field(default_factory=dict["tuple[str, str, tuple[str, ...]]", int])
    records: dict[tuple[int, ...], int] = field(default_factory=dict["tuple[int, ...]", int])
    folds: list[Mapping[str, object]] = field(default_factory=list["Mapping[str, object]"])
    folded: dict[str, int] = field(default_factory=dict[str, int])

    def record(self, line: Line, facts: NodeFacts | None) -> int:
        """The number of a line with its facts."""
        cost, origin, replaces = -1, -1, -1
        if facts is not None:
            node_cost = facts.cost
            figures = (int(node_cost.flops), int(node_cost.read_bytes), int(node_cost.written_bytes), node_cost.parameters)
            cost = _number(self.costs, figures)
            origin = _number(self.origins, (facts.origin.source, facts.origin.code, facts.origin.passes))
            replaces = _number(self.names, f"%{facts.origin.replaces}") if facts.origin.replaces else -1
        names = (_number(self.names, name) for name in line.names)
        return _number(self.records, (_number(self.pieces, line.pieces), cost, origin, replaces, *names))

    def fold(self, text: str, lines: Sequence[Line]) -> int:
        """The number of the identical layers of a program; equal ones have one number."""
        if text not in self.folded:
            layer_groups = {
                path: [[list(group.members), list(group.differences)] for group in groups]
                for path, groups in identical_layers(lines).items()
            }
            if layer_groups not in self.folds:
                self.folds.append(layer_groups)
            self.folded[text] = self.folds.index(layer_groups)
        return self.folded[text]

    def to_json(self) -> dict[str, object]:
        lists = {"pieces": self.pieces, "costs": self.costs, "origins": self.origins, "records": self.records}
        return {
            "names": list(self.names),
            "folds": self.folds,
            **{name: list(map(list, values)) for name, values in lists.items()},
        }


def _number(table: dict[Item, int], entry: Item) -> int:
    return table.setdefault(entry, len(table))
