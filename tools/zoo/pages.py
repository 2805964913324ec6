"""`python -m tools.zoo.pages`: write the HTML page and the SVG picture of every model of the zoo, and check what they fold.

A fold must hide nothing that differs: layers that are one row are compared anew, line by line, after their names are replaced;
and every node of a program must be drawn, stand behind one that is equal, or be counted by a closed module.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

import lissom
from lissom.inspect.identical_layers import identical_layers
from lissom.inspect.lines import Line
from lissom.inspect.svg.program import Compared, statuses
from lissom.inspect.svg.shown import shown
from tests.support.page_reading import data_of, texts_of
from tests.support.svg_reading import nodes as drawn_nodes
from tools.zoo.entry import Entry

_NAMES = re.compile(r"[%@][\w.]+")


def check(entry: Entry, report: Callable[[dict[str, Any]], None], folder: Path) -> None:
    """Write and check the pages of one model. report: called with the record after every phase."""
    record: dict[str, Any] = {"failed": None, "error": None, "phase": "build", "hidden": []}
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            _check(entry, record, report, folder)
    except Exception as error:
        record["failed"], record["error"] = record["phase"], f"{type(error).__name__}: {str(error)[:600]}"
    record["phase"] = None
    report(record)


def _check(entry: Entry, record: dict[str, Any], report: Callable[[dict[str, Any]], None], folder: Path) -> None:
    def phase(name: str) -> None:
        record["phase"] = name
        report(record)

    phase("capture")
    case = entry.build()
    case.model(*case.args, **case.kwargs)  # some models complete themselves in their first call, and capture refuses that
    model_report = lissom.optimize(case.model, case.inputs, checks="structural").report
    name = entry.name.replace("/", "-")
    started = time.process_time()
    phase("html")
    model_report.to_html(folder / f"{name}.html")
    phase("svg")
    picture = model_report.to_svg(folder / f"{name}.svg", compare=0)
    record["seconds"] = round(time.process_time() - started, 2)
    phase("read")
    if texts_of(data_of((folder / f"{name}.html").read_text(encoding="utf-8"))) != model_report.history.texts:
        record["hidden"].append("the page holds other programs")
    record["bytes"] = [(folder / f"{name}.{form}").stat().st_size for form in ("html", "svg")]
    for text in (model_report.history.texts[0], model_report.history.texts[-1]):
        record["hidden"] += hidden_by_folds([Line.of(line) for line in text.split("\n")])
    before, after = ([Line.of(line) for line in model_report.history.texts[index].split("\n")] for index in (0, -1))
    last = len(model_report.history.steps) - 1
    status = statuses(after, model_report.history.facts_of(last), Compared(before, "added", model_report.history.facts_of(0)))
    record["hidden"] += hidden_in_picture(model_report.history.texts[-1], picture, status)


def hidden_by_folds(lines: Sequence[Line]) -> list[str]:
    """Sentences on layers that are folded together and differ; the lines are compared as text, with names replaced."""
    sentences: list[str] = []
    types = {line.defines: line.type for line in lines if line.defines}
    for container, groups in identical_layers(lines).items():
        prefix = f"{container}." if container else ""
        for group in groups:
            layers = [[line for line in lines if f"{line.path}.".startswith(f"{prefix}{number}.")] for number in group.members]
            texts = [_anonymous(layer, f"{prefix}{number}", types) for layer, number in zip(layers, group.members, strict=True)]
            sentences += [
                f"{prefix}{number} is folded with {prefix}{group.members[0]}, and differs"
                for number, text in zip(group.members, texts, strict=True)
                if text != texts[0]
            ]
    return sentences


def _anonymous(lines: Sequence[Line], path: str, types: Mapping[str, str]) -> list[str]:
    """The text of a layer: its own nodes by their place in it, what it reads from outside by its type."""
    places = {line.defines: f"#{place}" for place, line in enumerate(lines)}

    def name(match: re.Match[str]) -> str:
        return places.get(match[0]) or types.get(match[0], "an input")

    texts = ("".join(f"{piece}{name}" for piece, name in zip(line.pieces, (*line.names, ""), strict=True)) for line in lines)
    heads = (text[: -len(line.path)] if line.path else text for text, line in zip(texts, lines, strict=True))
    return [f"{_NAMES.sub(name, head)}{line.path[len(path) :]}" for head, line in zip(heads, lines, strict=True)]


def hidden_in_picture(text: str, picture: str, status: Mapping[str, str] | None = None) -> list[str]:
    """Sentences on nodes that a picture neither draws, nor counts, nor stands another one for that is equal.

    status: of nodes, by name, in a picture that compares two programs.
    """
    lines = {line.defines: line for line in map(Line.of, text.split("\n")) if line.is_node}
    part = shown([Line.of(line) for line in text.split("\n")], status=status)
    sentences = [
        f"{name} stands behind {shown_by}, which differs"
        for name, shown_by in part.keys.items()
        if shown_by in lines and lines[shown_by].pattern != lines[name].pattern
    ]
    drawn = Counter(drawn_nodes(picture))
    sentences += [f"{name} is drawn {count} times" for name, count in drawn.items() if count > 1]
    sentences += [f"{name} is not drawn" for name in part.keys.values() if name in lines and name not in drawn]
    counted = len(part.keys) + part.sizes + part.left_out
    return sentences if counted == len(lines) else [*sentences, f"{len(lines) - counted} nodes are not counted"]


def describe(record: dict[str, Any]) -> str:
    """One line on a model."""
    if record.get("failed"):
        return f"{record['name']}: failed in {record['failed']}: {record['error'][:200]}"
    html, svg = (size / 1000 for size in record["bytes"])
    hidden = f", {len(record['hidden'])} hidden: {record['hidden'][0]}" if record["hidden"] else ""
    return f"{record['name']}: HTML {html:.0f} KB, SVG {svg:.0f} KB in {record['seconds']} s{hidden}"


def summary(records: Sequence[dict[str, Any]]) -> str:
    """The number of models with pages, those that failed, and what was hidden."""
    written = [record for record in records if not record.get("failed")]
    lines = [
        f"{len(records)} models, {len(written)} with pages, {sum(not record['hidden'] for record in written)} hide nothing"
    ]
    failed = Counter((record["failed"], record["error"][:100]) for record in records if record.get("failed"))
    lines += [f"  failed {count} x {phase}: {error}" for (phase, error), count in failed.most_common()]
    return "\n".join([*lines, *(f"  HIDDEN {describe(record)}" for record in written if record["hidden"])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages of the models that the arguments select; returns 1 if one cannot be written, or hides something."""
    from tools.zoo import selection
    from tools.zoo.catalogue import entries

    parser = argparse.ArgumentParser(prog="python -m tools.zoo.pages", description=__doc__)
    selection.add_arguments(parser, "zoo-pages.json")
    parser.add_argument("--folder", type=Path, default=Path("zoo-pages"), help="where the pages are written")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    write = partial(check, folder=options.folder)
    records = selection.run_chosen(options, selection.choose(parser, options, entries()), write, describe)
    print(summary(records))
    wrong = [record for record in records if record.get("hidden") or record.get("failed") in ("html", "svg", "read")]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
