"""Merging table rows that differ only in their layer number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

_NUMBER = re.compile(r"(?<!\w)\d+(?!\w)")

Row = tuple[str, ...]


def fold_rows(rows: Sequence[Row], label: int = 0) -> list[Row]:
    """The rows, with those that differ only in the first number of their label merged: `encoder.layer.0-5 ×6`.

    Args:
        label: the column that names the layer.
    """
    groups: dict[Row, list[Row]] = {}
    for row in rows:
        groups.setdefault((*row[:label], _NUMBER.sub("#", row[label], count=1), *row[label + 1 :]), []).append(row)
    return [group[0] if len(group) == 1 else _folded(group, label) for group in groups.values()]


def _folded(group: Sequence[Row], label: int) -> Row:
    matches = [_NUMBER.search(row[label]) for row in group]
    numbers = sorted({int(match.group()) for match in matches if match is not None})
    text = _NUMBER.sub(ranges(numbers), group[0][label], count=1)
    return (*group[0][:label], f"{text} ×{len(group)}", *group[0][label + 1 :])


def fold_names(names: Sequence[str]) -> str:
    """The names of equal layers as one: `encoder.layer.0-5 ×6`, or the first and how many more."""
    (folded, *others) = fold_rows([(name,) for name in names])
    return f"{folded[0]} and {len(others)} more" if others else folded[0]


def ranges(numbers: Sequence[int]) -> str:
    """`0-4,6` for 0, 1, 2, 3, 4 and 6."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
