"""`python -m tools.zoo.dynamo`: compare the models of the zoo under `torch.compile(backend="lissom")` with the models.

Each is called at up to four sizes, with the dynamic sizes that Dynamo finds and with `dynamic=True`. If the outputs differ or
the call fails, Dynamo's own backend `eager` is tried: a model that fails there too does not apply.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

import lissom
from lissom.compiler.ir.samples import Sample
from lissom.compiler.verify.divergence import tolerance_of
from lissom.errors import CaptureError
from lissom.frontends.capture.export import capture
from lissom.torch_compile import compile_graph
from tests.support.models import Case
from tools.zoo import catalogue, coverage, selection
from tools.zoo.check import answer, compared, other_samples, sentence
from tools.zoo.entry import Entry

MODES: Mapping[str, bool | None] = {"automatic": None, "dynamic": True}
_TOLERANCE = 1e-4  # float32, for models that cannot be captured: nothing is rewritten there, sums are at most reordered
Record = dict[str, Any]
Call = tuple[tuple[object, ...], Mapping[str, object]]


def check(entry: Entry, report: Callable[[Record], None]) -> None:
    """Build the model, call it at several sizes, and compare it compiled in each of MODES.

    report: called with the record after every phase.
    """
    record: Record = {"phase": "build", "failed": None, "error": None, "modes": {}}
    report(record)
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            case = entry.build()
            record["phase"] = "sizes"
            report(record)
            calls, allowed = _calls(case)
            wanted = [answer(case, *call) for call in calls]
            record["shapes"] = len(calls)
        except Exception as error:
            report(record | {"phase": None, "failed": record["phase"], "error": sentence(error)})
            return
        for mode, dynamic in MODES.items():
            record["phase"] = mode
            report(record)
            record["modes"][mode] = _under(case, calls, wanted, allowed, dynamic)
    report(record | {"phase": None})


def _calls(case: Case) -> tuple[list[Call], float]:
    """The example and up to three other calls of the model, with the relative tolerance of their outputs."""
    try:
        captured = capture(case.model, case.args, case.kwargs)
    except CaptureError:
        return [(case.args, case.kwargs)], _TOLERANCE
    signature = captured.program.signature
    samples: list[Sample] = [captured.example, *other_samples(case, signature, captured.example)]
    return [signature.arguments(sample) for sample in samples], tolerance_of(captured.program)


def _under(case: Case, calls: Sequence[Call], wanted: Sequence[Any], allowed: float, dynamic: bool | None) -> Record:
    """The result of one mode: whether the outputs are equal, the number of graphs, and why some were not compiled."""
    started = time.process_time()
    problem, error = _problem(case, calls, wanted, allowed, dynamic, compile_graph)
    reports = lissom.dynamo_reports()
    record: Record = {
        "equal": problem is None,
        "error_found": error,
        "graphs": len(reports),
        "lowered": sum(report.report is not None for report in reports),
        "reasons": list(dict.fromkeys(report.reason for report in reports if report.reason)),
        "seconds": round(time.process_time() - started, 2),
    }
    if problem is not None:
        record["problem"] = problem
        record["without"] = _problem(case, calls, wanted, allowed, dynamic, "eager")[0]
    return record


def _problem(
    case: Case, calls: Sequence[Call], wanted: Sequence[Any], allowed: float, dynamic: bool | None, backend: Any
) -> tuple[str | None, float | None]:
    """The problem with the compiled model's outputs, or None, and their largest relative error."""
    torch.compiler.reset()
    try:
        fast = Case(torch.compile(case.model, backend=backend, dynamic=dynamic), case.inputs)
        error, same = compared(wanted, [answer(fast, *call) for call in calls])
    except Exception as problem:
        return sentence(problem, last=True), None
    if not same:
        return "another structure", error
    return (None if error <= allowed else f"differs by {error:.2g} relative"), error


def describe(record: Record) -> str:
    """One line: the model, its time, and its result."""
    if record.get("failed"):
        outcome = f"{record['failed']}: {record['error']}"
    else:
        outcome = ", ".join(f"{mode}: {coverage.dynamo_outcome(result)}" for mode, result in record["modes"].items())
    return f"{record['name']} ({record['total_seconds']:.1f} s): {outcome}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the models that the arguments select; returns 1 if one has other outputs under `torch.compile`."""
    told = coverage.dynamo_section, coverage.dynamo_headline, coverage.is_wrong
    return selection.compare_all(arguments, "dynamo", __doc__, catalogue.entries(), check, describe, *told)


if __name__ == "__main__":
    sys.exit(main())
