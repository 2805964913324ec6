"""The models of the zoo that a run checks: the command-line arguments, and the entries they select."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tools.zoo.coverage import load
from tools.zoo.entry import FAMILIES, Entry


def add_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the arguments of every run of the zoo. output: the default file of the records."""
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this family; may be given again")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these models")
    parser.add_argument("--limit-seconds", type=float, default=300.0, help="processor seconds per model (default 300)")
    parser.add_argument("--jobs", type=int, default=2, help="parallel models (default 2)")
    parser.add_argument(
        "--output", type=Path, default=Path(output), help="file for the records, one per line (default %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="keep the records in the output, and check the other models")
    parser.add_argument("--page", type=Path, help="the page to update; docs/coverage.md if all models are run")


def choose(parser: argparse.ArgumentParser, options: argparse.Namespace, entries: Sequence[Entry]) -> list[Entry]:
    """The models the arguments name, without those a resumed run has records of. Unknown names end the run."""
    chosen = [entry for entry in entries if not options.family or entry.family in options.family]
    if options.only:
        unknown = set(options.only) - {entry.name for entry in chosen}
        if unknown:
            parser.error(f"no such models: {', '.join(sorted(unknown))}; `python -m tools.zoo --list` prints the names")
        chosen = [entry for entry in chosen if entry.name in options.only]
    if options.resume and options.output.exists():
        done = {record["name"] for record in load(options.output)}
        chosen = [entry for entry in chosen if entry.name not in done]
    return chosen


def page(options: argparse.Namespace) -> Path | None:
    """The page a run writes into; None if only some models were run and no page is named."""
    return options.page or (None if options.family or options.only else Path("docs/coverage.md"))
