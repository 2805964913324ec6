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
    from tests.zoo.coverage import headline, load, page, surprises, with_runtime
    from tests.zoo.entry import FAMILIES
    from tests.zoo.runner import run

    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this family; may be given again")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these models")
    parser.add_argument("--limit-seconds", type=float, default=150.0, help="processor seconds one model may take (default 150)")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default 2)")
    parser.add_argument("--output", type=Path, help="where the records go, one a line; zoo.json, or zoo-BACKEND.json")
    parser.add_argument("--backend", default="eager", help="what runs the models; onnxruntime adds a column to the page")
    parser.add_argument("--attention", choices=("eager", "sdpa"), help="the spelling of attention transformers is to use")
    parser.add_argument("--resume", action="store_true", help="keep the records the output has, and check the other models")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--page", type=Path, help="where the page goes; docs/coverage.md when all models are run")
    options = parser.parse_args(arguments)
    eager, runtime = Path("zoo.json"), Path("zoo-onnxruntime.json")
    options.output = options.output or (eager if options.backend == "eager" else Path(f"zoo-{options.backend}.json"))
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
    run(chosen, options.output, seconds=options.limit_seconds, jobs=options.jobs, backend=options.backend)
    records = load(options.output)
    whole = not (options.family or options.only)
    base = options.output if options.backend == "eager" else eager
    if (options.page or whole) and base.exists():
        target = options.page or Path("docs/coverage.md")
        beside = options.output if options.backend == "onnxruntime" else runtime
        found = with_runtime(load(base), load(beside) if beside.exists() else [])
        target.write_text(page(found), encoding="utf-8")
    minutes = (time.perf_counter() - started) / 60
    print(f"{headline(records)}{minutes:.1f} minutes; the records are in {options.output}")
    unexpected = surprises(records)
    print("\n".join(unexpected), end="\n" if unexpected else "")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
