"""The suite: every operator of OpInfo, its sample inputs, and the calls these make."""

from __future__ import annotations

import importlib
import itertools
import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import torch

from tools.suites.known import OPINFO
from tools.suites.opinfo.axis_rules import check_axes, has_axis_rule
from tools.suites.opinfo.calls import Call, OneCall, calls_of, program_of
from tools.suites.opinfo.cost_rules import check_cost, check_flops, flops_of, has_formula
from tools.suites.opinfo.placement_rules import check_placements, has_placement_rule
from tools.suites.suite import Item, Record, Report, Suite, given
from tools.zoo.check import sentence
from tools.zoo.coverage import table

KINDS = ("axes", "placement", "bytes", "operations")
"""The kinds of rules."""
_SAMPLES = 400
"""The most sample inputs of one operator; the few with more repeat their shapes."""


def items(everything: bool) -> list[Item]:
    """The operators that have float32 samples on the CPU."""
    op_db = importlib.import_module("torch.testing._internal.common_methods_invocations").op_db
    ops = [op for op in op_db if torch.float32 in op.dtypes]
    return [Item(f"{op.name}.{op.variant_test_name}".rstrip("."), op.name, partial(given, op)) for op in ops]


def check(item: Item, report: Report) -> None:
    """Check the rules of every operator that the samples call. report: called with the record after every sample."""
    op = item.build()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    record: Record = {"phase": "samples", "samples": 0, "untraced": 0, "faults": [], "operators": counts, "result": "no rule"}
    report(record)
    torch.manual_seed(0)
    generator, seen = random.Random(item.name), set[str]()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for sample in itertools.islice(op.sample_inputs("cpu", torch.float32), _SAMPLES):
            record["samples"] += 1
            try:
                calls = list(calls_of(op.op, (sample.input, *sample.args), sample.kwargs))
            # Some operators cannot be traced, which is a limit of PyTorch's tracer.
            except Exception as error:
                record["untraced"] += 1
                record["reason"] = sentence(error)
                continue
            for call in calls:
                if call.key not in seen:
                    seen.add(call.key)
                    _check_call(call, generator, counts, record["faults"])
            report({"samples": record["samples"]})
    if record["faults"]:
        record |= {"result": "disagrees", "reason": record["faults"][0]}
    elif any(kinds[f"{kind} agrees"] for kinds in counts.values() for kind in ("axes", "placement", "operations")):
        record["result"] = "agrees"
    elif record["untraced"] == record["samples"]:
        record["result"] = "not traced"
    report(record | {"phase": None})


def _check_call(call: Call, generator: random.Random, counts: dict[str, Counter[str]], faults: list[str]) -> None:
    """Check each kind of rule on one call; the first fault of each kind and operator is kept as a sentence."""
    one = program_of(call)
    if one is None:
        return
    name = str(call.target)
    counts[name]["calls"] += 1
    checks: dict[str, tuple[Callable[[OneCall], bool], Callable[[], str]]] = {
        "axes": (has_axis_rule, lambda: check_axes(call, generator)),
        "placement": (has_placement_rule, lambda: check_placements(call, generator)),
        "bytes": (lambda one: True, lambda: check_cost(call)),
        "operations": (has_formula, lambda: check_flops(call)),
    }
    for kind, (has_rule, find_fault) in checks.items():
        if not has_rule(one):
            if kind == "operations":
                counts[name]["operations only PyTorch counts"] += flops_of(call) > 0
            continue
        try:
            problem = find_fault()
        # A rule may raise anything; each is a fault to report.
        except Exception as error:
            problem = f"{call}: {type(error).__name__}: {sentence(error)}"
        counts[name][f"{kind} {'disagrees' if problem else 'agrees'}"] += 1
        if problem and counts[name][f"{kind} disagrees"] == 1:
            faults.append(f"{kind}: {problem}")


def details(records: Sequence[Record]) -> str:
    """For each kind of rule, the operators that have one, and the calls on which they agree."""
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for name, counts in record.get("operators", {}).items():
            totals[name].update(counts)
    rows = []
    for kind in KINDS:
        agree = sum(counts[f"{kind} agrees"] for counts in totals.values())
        wrong = {name: counts[f"{kind} disagrees"] for name, counts in totals.items() if counts[f"{kind} disagrees"]}
        ruled = [name for name, counts in totals.items() if counts[f"{kind} agrees"] or counts[f"{kind} disagrees"]]
        named = ", ".join(f"`{name}` ({count})" for name, count in sorted(wrong.items())) or "none"
        rows.append([kind, str(len(ruled)), str(len(totals) - len(ruled)), str(agree), str(sum(wrong.values())), named])
    uncounted = ", ".join(f"`{name}`" for name, counts in sorted(totals.items()) if counts["operations only PyTorch counts"])
    samples = sum(record.get("samples", 0) for record in records)
    untraced = sum(record.get("untraced", 0) for record in records)
    return (
        f"{samples} sample inputs, of which {untraced} cannot be traced, make calls of {len(totals)} ATen operators. Calls "
        f"that differ only in values count once for each operator of OpInfo.\n\n"
        + table(["rule", "operators with one", "without", "calls that agree", "that disagree", "operators that disagree"], rows)
        + f"\nOperators without a formula whose operations PyTorch counts: {uncounted or 'none'}.\n"
    )


def warm() -> None:
    """Import the samples, and trace one call."""
    importlib.import_module("torch.testing._internal.common_methods_invocations")
    list(calls_of(torch.add, (torch.zeros(2), torch.zeros(2)), {}))


SUITE = Suite(
    title="OpInfo",
    introduction="""\
The sample inputs of `torch.testing._internal.common_methods_invocations.op_db` in float32 on the CPU. Each is traced to ATen
calls as capture does, and the rules for each call are checked:

- *axes*: random indices of an axis are removed from the arguments as a pass does; the results lack these indices, and are
  otherwise equal. What is summed over or normed is zero there.
- *placement*: the arguments are sharded along one or several dimensions, or are pending sums, on 2 and 5 ranks; the partitioned
  call returns the whole result on every rank.
- *bytes*: the type of the result, and the bytes read and written, are those of real tensors; views move nothing.
- *operations*: the same number as `torch.utils.flop_counter`.
""",
    noun="operators of OpInfo",
    items=items,
    check=check,
    warm=warm,
    results={
        "agrees": "every rule agrees on every sample",
        "no rule": "only the bytes are checked",
        "not traced": "PyTorch's tracer takes none of the samples",
        "failure": "an error or a time-out of the check",
        "disagrees": "a rule disagrees on a sample",
    },
    faults=frozenset({"failure", "disagrees"}),
    known=OPINFO,
    details=details,
    seconds=400.0,
    block=8,
)
