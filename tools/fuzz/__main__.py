"""`python -m tools.fuzz`: run a campaign of random cases, or replay one case."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import get_args

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from lissom.compiler.pipeline.options import Checks
from tools.fuzz import campaign, case
from tools.fuzz.case import Case, Outcome, draw_case
from tools.zoo import catalogue, fresh


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments select; returns 1 if a case failed."""
    options = _options(arguments)
    campaign.warm_up()
    with fresh.loader() as address:
        if options.replay is not None:
            outcome = case.run(Case.from_json(options.replay), address)
            print(f"{outcome.kind}: {outcome.detail}")
            return int(outcome.failed)
        return _run(options, address)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="how many cases (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the number of the first case (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this many minutes")
    parser.add_argument("--jobs", type=int, default=2, help="parallel processes (default %(default)s)")
    parser.add_argument("--backend", action="append", help="eager or onnxruntime; may be given again (default eager)")
    parser.add_argument("--zoo-share", type=float, default=0.0, help="fraction of cases with an architecture of the zoo")
    parser.add_argument(
        "--family", action="append", help="family of the zoo; may be given again (default hand-written and encoder)"
    )
    parser.add_argument("--recovery", action="store_true", help="every pipeline is two lossy passes and distill")
    parser.add_argument("--checks", choices=get_args(Checks), help="the checks of every case (default drawn)")
    parser.add_argument("--log", type=Path, help="append every outcome to this file, one JSON object per line")
    parser.add_argument("--no-shrink", action="store_true", help="do not shrink failures")
    parser.add_argument("--replay", help="run one case, as a failure prints it")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace, address: str) -> int:
    started = time.monotonic()
    counts: Counter[str] = Counter()
    failures: list[tuple[int, Case, str]] = []
    for number, drawn, outcome in _until_interrupted(campaign.run_all(_blocks(options, started), options.jobs, address)):
        counts[outcome.kind] += 1
        if options.log:
            with options.log.open("a", encoding="utf-8") as log:
                record = {"number": number, "kind": outcome.kind, "detail": outcome.detail, "passes": drawn.passes}
                log.write(json.dumps(record | {"checks": drawn.checks, "backend": drawn.backend, "zoo": drawn.zoo}) + "\n")
        if outcome.kind not in ("equal", "refused"):
            print(
                f"{number} {outcome.kind}: {','.join(drawn.passes)} ({drawn.checks}, {drawn.backend})\n    {outcome.detail}",
                flush=True,
            )
        if outcome.failed:
            failures.append((number, drawn, outcome.kind))
    for number, drawn, kind in failures:
        if not options.no_shrink:
            drawn = campaign.shrink(drawn, kind, lambda candidate: campaign.run_apart(candidate, address).kind)
        print(f"{number} {kind}: python -m tools.fuzz --replay '{drawn.to_json()}'")
    total = counts.total()
    shown = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    print(f"{total} cases from {options.seed} in {time.monotonic() - started:.0f} s: {shown or 'none'}")
    return int(bool(failures))


def _until_interrupted(outcomes: Iterator[tuple[int, Case, Outcome]]) -> Iterator[tuple[int, Case, Outcome]]:
    with suppress(KeyboardInterrupt):
        yield from outcomes


def _blocks(options: argparse.Namespace, started: float) -> Iterator[list[tuple[int, Case]]]:
    """The cases, grouped by model."""
    families = options.family or ["hand-written", "encoder"]
    names = tuple(entry.name for entry in catalogue.entries() if entry.family in families) if options.zoo_share else ()
    backends = tuple(options.backend or ["eager"])
    number, end = options.seed, options.seed + options.count
    while number < end and time.monotonic() - started < 60 * options.minutes:
        stop = min(end, (number // case.PER_MODEL + 1) * case.PER_MODEL)
        drawn = [
            (at, draw_case(at, backends, names, options.zoo_share, recovery=options.recovery)) for at in range(number, stop)
        ]
        yield [(at, replace(case, checks=options.checks or case.checks)) for at, case in drawn]
        number = stop


if __name__ == "__main__":
    sys.exit(main())
