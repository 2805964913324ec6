"""`python -m tools.zoo`: check the models of the zoo and write the results."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the models that the arguments select; returns 1 if a result is unexpected."""
    from tools.zoo import selection
    from tools.zoo.catalogue import entries
    from tools.zoo.check import BACKENDS, check, describe
    from tools.zoo.coverage import headline, surprises, write_page
    from tools.zoo.fresh import loader

    parser = argparse.ArgumentParser(prog="python -m tools.zoo", description=__doc__)
    selection.add_arguments(parser, "zoo.json")
    parser.add_argument("--backend", action="append", choices=tuple(BACKENDS), help="only this backend; may be given again")
    parser.add_argument("--no-reload", action="store_true", help="do not save and load compiled models")
    parser.add_argument("--attention", choices=("eager", "sdpa"), help="the attention implementation in transformers")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args(arguments)
    chosen = selection.choose(parser, options, entries(options.attention))
    if options.list:
        print("\n".join(entry.name for entry in chosen))
        return 0
    started = time.perf_counter()
    backends = options.backend or tuple(BACKENDS)
    with nullcontext() if options.no_reload else loader() as address:
        records = selection.run_chosen(options, chosen, partial(check, backends=backends, loader=address), describe)
    if (page := selection.page(options)) is not None:
        write_page(page, records)
    minutes = (time.perf_counter() - started) / 60
    print(f"{headline(records)}{minutes:.1f} minutes; the records are in {options.output}")
    unexpected = surprises(records)
    print("\n".join(unexpected), end="\n" if unexpected else "")
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main())
