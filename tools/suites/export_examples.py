"""The examples of `torch._export.db`: what `torch.export` takes and refuses, one small model each."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Sequence
from functools import partial

import torch

from tools.suites.models import RESULTS, check_model
from tools.suites.suite import Item, Record, Report, Suite, given
from tools.zoo.check import sentence
from tools.zoo.coverage import cell, table


def items(everything: bool) -> list[Item]:
    """All examples."""
    examples = importlib.import_module("torch._export.db.examples").all_examples()
    # Examples of one tag may share a name, so the name of the class counts.
    named = {type(case.model).__name__: case for case in examples.values()}
    return [Item(name, " ".join(sorted(case.tags)) or "python", partial(given, case)) for name, case in named.items()]


def check(item: Item, report: Report) -> None:
    """Export one example with PyTorch, then check it. report: called with the record after every phase."""
    case = item.build()
    inputs = case.example_args, case.example_kwargs
    report({"phase": "torch.export", "support": case.support_level.name.lower()})
    accepted = ""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            torch.export.export(copy.deepcopy(case.model), *copy.deepcopy(inputs), strict=False)
        # Each example shows another error.
        except Exception as error:
            accepted = sentence(error)
    report({"phase": "capture"})
    torch.manual_seed(0)
    more = [(case.extra_args, {})] if case.extra_args else []
    record = check_model(case.model.eval(), inputs, more)
    if accepted and record["result"] == "refused":
        record["result"] = "refused by both"
    report({"phase": None} | record)


def details(records: Sequence[Record]) -> str:
    """The examples that are refused, with the reason."""
    told = sorted((record for record in records if "refused" in record.get("result", "")), key=lambda record: record["name"])
    rows = [[f"`{record['name']}`", record["result"], cell(record["reason"])] for record in told]
    return table(["example", "result", "reason"], rows)


def warm() -> None:
    """Fill the caches of the capture."""
    check_model(torch.nn.Linear(2, 2), ((torch.zeros(2, 2),), {}))


SUITE = Suite(
    title="torch.export examples",
    introduction="The examples of `torch._export.db.examples`, each a small model that `torch.export` supports or refuses.\n",
    noun="examples",
    items=items,
    check=check,
    warm=warm,
    results={
        "equal": RESULTS["equal"],
        "refused by both": "`torch.export` refuses it, and Lissom does and says why",
        **{name: meaning for name, meaning in RESULTS.items() if name != "equal"},
    },
    faults=frozenset({"failure", "wrong"}),
    details=details,
)
