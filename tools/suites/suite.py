"""A suite of another project: its items, the check of one item, and the section of the page that its records make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.zoo.coverage import cell, table

Record = dict[str, Any]
Report = Callable[[Record], None]


@dataclass(frozen=True)
class Item:
    """One item of a suite. name: unique in the suite. family: what it is counted under. build: gives what the check needs."""

    name: str
    family: str
    build: Callable[[], Any]


@dataclass(frozen=True)
class Suite:
    """A suite.

    title: the heading of its section. introduction: the paragraph below it. noun: what its items are, for the sentence that
    counts them. items: all items, or with False those of the usual run. check: checks one item. warm: imports what checks need.
    results: the results an item may have, in order, each with its meaning; faults: those that are faults of Lissom.
    known: faults that stay, by item, with the reason. details: more text for the section.
    seconds: processor seconds per item. block: items that share a process.
    """

    title: str
    introduction: str
    noun: str
    items: Callable[[bool], list[Item]]
    check: Callable[[Item, Report], None]
    warm: Callable[[], None]
    results: Mapping[str, str]
    faults: frozenset[str]
    known: Mapping[str, str] = field(default_factory=dict[str, str])
    details: Callable[[Sequence[Record]], str] = lambda records: ""
    seconds: float = 120.0
    block: int = 1


def given(case: Any) -> Any:
    """The case itself: what an item builds that is made already."""
    return case


def result_of(record: Record) -> str:
    """The result of a record; a crash and a time-out of the process are failures."""
    return "failure" if record.get("failed") else record.get("result", "failure")


def describe(record: Record) -> str:
    """One line: the item and its result."""
    reason = record.get("error") or record.get("reason") or ""
    return f"{record['name']}: {result_of(record)}{f': {reason}' if reason else ''}"


def surprises(suite: Suite, records: Sequence[Record]) -> list[str]:
    """Items with a fault that is not known, and known ones without a fault."""
    sentences: list[str] = []
    for record in records:
        is_fault = result_of(record) in suite.faults
        if is_fault and record["name"] not in suite.known:
            sentences.append(describe(record))
        elif not is_fault and record["name"] in suite.known:
            sentences.append(f"{record['name']} has no fault now; take it out of known.py")
    return sentences


def headline(suite: Suite, records: Sequence[Record]) -> str:
    """The sentence that counts the items of each result."""
    counts = Counter(map(result_of, records))
    named = ", ".join(f"{counts[result]} {result}" for result in suite.results if counts[result])
    return f"Of {len(records)} {suite.noun}: {named}."


def section(suite: Suite, records: Sequence[Record]) -> str:
    """The section of the page: the meaning of each result, the counts, every fault with its reason, and the details."""
    meanings = "".join(f"- *{result}*: {meaning}\n" for result, meaning in suite.results.items())
    parts = [f"## {suite.title}\n", suite.introduction, meanings, f"{headline(suite, records)}\n"]
    faulty = [record for record in records if result_of(record) in suite.faults]
    if faulty:
        rows = [[f"`{record['name']}`", result_of(record), cell(_reason(suite, record))] for record in faulty]
        parts.append(table(["item", "result", "reason"], rows))
    if details := suite.details(records):
        parts.append(details)
    return "\n".join(parts)


def _reason(suite: Suite, record: Record) -> str:
    return suite.known.get(record["name"]) or record.get("error") or record.get("reason") or ""


def counts_by(records: Iterable[Record], key: Callable[[Record], str]) -> list[tuple[str, int]]:
    """The number of records of each key, the most frequent first."""
    return sorted(Counter(map(key, records)).items(), key=lambda pair: (-pair[1], pair[0]))
