"""`python -m tools.suites NAME`: run a test suite of another project, and write the results."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tools.suites.suite import Suite, describe, headline, section, surprises
from tools.zoo.coverage import load, put_section
from tools.zoo.runner import run

SUITES = {"opinfo": "opinfo", "export": "export_examples", "onnx": "onnx_backend", "timm": "timm_models"}
"""The modules of the suites."""
PAGE = Path("docs/suites.md")


def suite_of(name: str) -> Suite:
    """The suite of that name. A suite is imported only when it runs, because each needs packages of its own."""
    return importlib.import_module(f"tools.suites.{SUITES[name]}").SUITE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the items of a suite that the arguments select; returns 1 if a result is unexpected."""
    parser = argparse.ArgumentParser(prog="python -m tools.suites", description=__doc__)
    parser.add_argument("suite", choices=tuple(SUITES))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these items")
    parser.add_argument("--all", action="store_true", help="timm: all models, not one of each module")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--jobs", type=int, default=2, help="parallel items (default 2)")
    parser.add_argument("--output", type=Path, help="file for the records, one per line (default suite-NAME.json)")
    parser.add_argument("--resume", action="store_true", help="keep the records in the output, and run the other items")
    parser.add_argument("--page", type=Path, help="the page whose section is replaced; docs/suites.md if all items are run")
    options = parser.parse_args(arguments)
    suite, output = suite_of(options.suite), options.output or Path(f"suite-{options.suite}.json")
    chosen = suite.items(options.all)
    if unknown := set(options.only or ()) - {item.name for item in chosen}:
        parser.error(f"no such items: {', '.join(sorted(unknown))}; `--list` prints the names")
    chosen = [item for item in chosen if not options.only or item.name in options.only]
    if options.list:
        print("\n".join(item.name for item in chosen))
        return 0
    if not options.resume:
        output.unlink(missing_ok=True)
    done = {record["name"] for record in load(output)} if output.exists() else set()
    started = time.perf_counter()
    left = [item for item in chosen if item.name not in done]
    run(left, output, suite.check, describe, seconds=suite.seconds, jobs=options.jobs, warm=suite.warm, block=suite.block)
    records = load(output)
    if page := options.page or (None if options.only else PAGE):
        put_section(page, section(suite, records))
    unexpected = surprises(suite, records)
    print("\n".join([*unexpected, headline(suite, records)]))
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes; the records are in {output}")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
