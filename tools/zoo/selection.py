"""The models of the zoo that a run checks: the command-line arguments, the entries they select, and the run itself."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from tools.zoo.coverage import load, put_section
from tools.zoo.entry import FAMILIES, Entry
from tools.zoo.runner import Check, Record, run


def add_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the arguments of every run of the zoo. output: the default file of the records."""
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these models, or models of these families")
    parser.add_argument("--sample", type=int, help="only so many of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default %(default)s)")
    parser.add_argument("--limit-seconds", type=float, default=300.0, help="processor seconds per model (default 300)")
    parser.add_argument("--jobs", type=int, default=2, help="parallel models (default 2)")
    parser.add_argument(
        "--output", type=Path, default=Path(output), help="file for the records, one per line (default %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="keep the records in the output, and check the other models")
    parser.add_argument("--page", type=Path, help="the page to update; docs/coverage.md if all models are run")


def choose(parser: argparse.ArgumentParser, options: argparse.Namespace, entries: Sequence[Entry]) -> list[Entry]:
    """The models the arguments name, without those a resumed run has records of. Unknown names end the run."""
    chosen = list(entries)
    if options.only:
        unknown = set(options.only) - {entry.name for entry in chosen} - set(FAMILIES)
        if unknown:
            parser.error(
                f"no such models: {', '.join(sorted(unknown))}; `python -m tools.zoo --list` prints the names, and the "
                f"families are {', '.join(FAMILIES)}"
            )
        chosen = [entry for entry in chosen if entry.name in options.only or entry.family in options.only]
    if options.sample is not None:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
    if options.resume and options.output.exists():
        done = {record["name"] for record in load(options.output)}
        chosen = [entry for entry in chosen if entry.name not in done]
    return chosen


def run_chosen(
    options: argparse.Namespace,
    chosen: Sequence[Entry],
    check: Check[Entry],
    describe: Callable[[Record], str],
    warm: Callable[[], None] | None = None,
) -> list[Record]:
    """Check the models, and return all records in the output: those of earlier runs too, if this one resumes them."""
    if not options.resume:
        options.output.unlink(missing_ok=True)
    run(chosen, options.output, check, describe, seconds=options.limit_seconds, jobs=options.jobs, warm=warm)
    return load(options.output)


def page(options: argparse.Namespace) -> Path | None:
    """The page a run writes into; None if only some models were run and no page is named."""
    return options.page or (None if options.only or options.sample is not None else Path("docs/coverage.md"))


def compare_all(
    arguments: Sequence[str] | None,
    name: str,
    about: str | None,
    entries: Sequence[Entry],
    check: Check[Entry],
    describe: Callable[[Record], str],
    section: Callable[[Sequence[Record]], str],
    headline: Callable[[Sequence[Record]], str],
    is_wrong: Callable[[Record], bool],
) -> int:
    """The main function of `tools.zoo.NAME`: check the models that the arguments select, and write the section of the page.

    Prints the headline and the models that are wrong; returns 1 if there are any.
    """
    parser = argparse.ArgumentParser(prog=f"python -m tools.zoo.{name}", description=about)
    add_arguments(parser, f"{name}.json")
    options = parser.parse_args(arguments)
    records = run_chosen(options, choose(parser, options, entries), check, describe)
    if (path := page(options)) is not None:
        put_section(path, section(records))
    wrong = [record for record in records if is_wrong(record)]
    print("\n".join([headline(records), *map(describe, wrong)]))
    return 1 if wrong else 0
