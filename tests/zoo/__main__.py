"""`python -m tests.zoo`: check the models of the zoo and write what is found."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main(arguments: Sequence[str] | None = None) -> int:
    from tests.zoo.catalogue import entries
    from tests.zoo.entry import FAMILIES
    from tests.zoo.runner import run

    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this family; may be given again")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these models")
    parser.add_argument("--limit-seconds", type=float, default=60.0, help="how long one model may take (default 60)")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default 2)")
    parser.add_argument("--output", type=Path, default=Path("zoo.json"), help="where the records go, one a line")
    parser.add_argument("--attention", choices=("eager", "sdpa"), help="the spelling of attention transformers is to use")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args(arguments)
    chosen = [entry for entry in entries(options.attention) if not options.family or entry.family in options.family]
    chosen = [entry for entry in chosen if not options.only or entry.name in options.only]
    if options.list:
        print("\n".join(entry.name for entry in chosen))
        return 0
    started = time.perf_counter()
    records = run(chosen, options.output, seconds=options.limit_seconds, jobs=options.jobs)
    good = sum(bool(record.get("equal") and record.get("agrees")) for record in records)
    print(f"{good} of {len(records)} models equal, {(time.perf_counter() - started) / 60:.1f} minutes; see {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
