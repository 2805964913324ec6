"""`python -m tools.fuzz_artifacts --count N --seed S`: mutate artifacts, load them, and print the faults."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools.fuzz_artifacts.campaign import Case, Worker, make_samples, run
from tools.fuzz_artifacts.samples import SAMPLES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign, or replay one case; returns 1 if there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz_artifacts", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="changed artifacts (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", action="append", choices=tuple(SAMPLES), help="only this sample; may be given again")
    parser.add_argument("--limit-seconds", type=float, default=60.0, help="time limit of one artifact (default 60)")
    parser.add_argument("--folder", type=Path, help="where the samples are kept for the next run; a temporary one by default")
    parser.add_argument("--replay", metavar="CASE", help="one case, as a campaign prints it")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="lissom-fuzz-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        if options.replay:
            case = Case.of(options.replay)
            make_samples(folder, [case.sample])
            worker = Worker(folder, options.limit_seconds)
            word = worker.judge(case)
            worker.close()
            print(word)
            return int(word.startswith("FAULT"))
        names = options.sample or list(SAMPLES)
        make_samples(folder, names)
        words, faults = run(folder, names, options.seed, count=options.count, limit_seconds=options.limit_seconds)
    print("\n".join(f"{number:6} {word}" for word, number in sorted(words.items())))
    print(f"{words.total()} changed artifacts, {len(faults)} faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
