"""`python -m tests.zoo`: check the models of the zoo and write what is found."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main(arguments: Sequence[str] | None = None) -> int:
    from tests.zoo.catalogue import entries
    from tests.zoo.check import BACKENDS, check, describe
    from tests.zoo.coverage import headline, load, surprises, write_page
    from tests.zoo.entry import FAMILIES
    from tests.zoo.fresh import loader
    from tests.zoo.runner import run

    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this family; may be given again")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these models")
    parser.add_argument("--limit-seconds", type=float, default=300.0, help="processor seconds one model may take (default 300)")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default 2)")
    parser.add_argument(
        "--output", type=Path, default=Path("zoo.json"), help="where the records go, one a line (default zoo.json)"
    )
    parser.add_argument("--backend", action="append", choices=tuple(BACKENDS), help="only this backend; may be given again")
    parser.add_argument("--no-reload", action="store_true", help="do not save and load what was compiled")
    parser.add_argument("--attention", choices=("eager", "sdpa"), help="the spelling of attention transformers is to use")
    parser.add_argument("--resume", action="store_true", help="keep the records the output has, and check the other models")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--page", type=Path, help="where the page goes; docs/coverage.md when all models are run")
    options = parser.parse_args(arguments)
    chosen = [entry for entry in entries(options.attention) if not options.family or entry.family in options.family]
    if options.only:
        unknown = set(options.only) - {entry.name for entry in chosen}
        if unknown:
            parser.error(f"no such models: {', '.join(sorted(unknown))}; --list prints the names")
        chosen = [entry for entry in chosen if entry.name in options.only]
    if options.resume and options.output.exists():
        done = {record["name"] for record in load(options.output)}
        chosen = [entry for entry in chosen if entry.name not in done]
    if options.list:
        print("\n".join(entry.name for entry in chosen))
        return 0
    if not options.resume:
        options.output.unlink(missing_ok=True)
    started = time.perf_counter()
    backends = options.backend or tuple(BACKENDS)
    limit, jobs = options.limit_seconds, options.jobs
    with nullcontext() if options.no_reload else loader() as address:
        run(chosen, options.output, partial(check, backends=backends, loader=address), describe, seconds=limit, jobs=jobs)
    records = load(options.output)
    whole = not (options.family or options.only)
    if options.page or whole:
        write_page(options.page or Path("docs/coverage.md"), records)
    minutes = (time.perf_counter() - started) / 60
    print(f"{headline(records)}{minutes:.1f} minutes; the records are in {options.output}")
    unexpected = surprises(records)
    print("\n".join(unexpected), end="\n" if unexpected else "")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
