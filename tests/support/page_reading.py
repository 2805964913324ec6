"""Reads the data of a report's page back, by a reader written differently from the page's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lissom.inspect.report import Report


def written(report: Report, folder: Path) -> str:
    """The page of a report."""
    path = folder / "report.html"
    report.to_html(path)
    return path.read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    """The JSON block of a page."""
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(block)


def texts_of(data: dict) -> list[str]:
    """The text of the program after each step."""
    lines: list[int] = []
    found = []
    for step in data["steps"]:
        numbers = iter(step["lines"] or [0, 0, len(lines)])
        stretches = list(zip(numbers, numbers, numbers, strict=True))
        before = lines
        lines = []
        for new, start, count in stretches:
            stretch = range(start, start + count)
            lines += stretch if new else [before[place] for place in stretch]
        found.append("\n".join(line_text(data, number) for number in lines))
    return found


def line_text(data: dict, number: int) -> str:
    piece, _, _, _, *names = data["records"][number]
    spaces = [data["names"][name] for name in names] + [""]
    return "".join(text + name for text, name in zip(data["pieces"][piece], spaces, strict=True))


def costs_of(data: dict) -> dict[str, list[int]]:
    """The costs of the nodes after the last step that are known, by name."""
    text = texts_of(data)[-1].split("\n")
    numbers = {line_text(data, number): number for number in range(len(data["records"]))}
    records = [data["records"][numbers[line]] for line in text]
    return {data["names"][record[4]]: data["costs"][record[1]] for record in records if record[1] >= 0}
