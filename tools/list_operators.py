"""`python -m tools.list_operators`: the operators in the captured models of the zoo, as one JSON line per model.

Operators that are not in `lissom/artifacts/allowed.py` are printed. Before one is added there, check what it does with invalid
arguments.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from lissom.artifacts.operators import is_allowed
from lissom.errors import LissomError
from lissom.frontends.capture.export import capture
from tools.zoo import selection
from tools.zoo.catalogue import entries
from tools.zoo.entry import Entry


def collect(entry: Entry, report: Callable[[dict[str, Any]], None]) -> None:
    """Report the operators of a captured model, with all sizes fixed."""
    report({"phase": "capture", "operators": []})
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            case = entry.build()
            program = capture(case.model, case.args, case.kwargs, dynamic=False).program
    except LissomError as error:
        report({"phase": None, "error": str(error)})
        return
    called = {str(node.target) for node in program.nodes() if isinstance(node.target, torch._ops.OpOverload)}
    report({"phase": None, "operators": sorted(called)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Collect the operators, and print those that are not on the list; returns 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m tools.list_operators", description=__doc__)
    selection.add_arguments(parser, "operators.json")
    options = parser.parse_args(arguments)
    chosen = selection.choose(parser, options, entries())
    describe = lambda record: f"{record['name']}: {record.get('error') or len(record.get('operators', ()))}"  # noqa: E731
    records = selection.run_chosen(options, chosen, collect, describe)
    needed: dict[str, str] = {}
    for record in records:
        needed |= {name: record["name"] for name in record.get("operators", ()) if not is_allowed(name)}
    print("\n".join(f"{name} ({model})" for name, model in sorted(needed.items())) or "every operator is on the list")
    return 1 if needed else 0


if __name__ == "__main__":
    sys.exit(main())
