"""A few items of each suite of `tools.suites`, the faults that the checks find, and the page."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from lissom.compiler.analysis import flops
from lissom.compiler.analysis.axes import rules as axis_rules
from lissom.compiler.ir.placement import sharded
from lissom.compiler.parallel.rules import table
from lissom.compiler.parallel.rules.base import Outcome
from tests.support.models import normal
from tools.suites import __main__, export_examples, onnx_backend, timm_models
from tools.suites.models import check_model
from tools.suites.opinfo import calls
from tools.suites.opinfo import suite as opinfo
from tools.suites.suite import Item, Suite, headline, section, surprises
from tools.zoo.coverage import put_section

aten = torch.ops.aten
F = torch.nn.functional


def checked(check: Any, item: Item) -> dict[str, Any]:
    record: dict[str, Any] = {"name": item.name, "family": item.family}
    check(item, record.update)
    return record


def faults_of(function: Any, *tensors: torch.Tensor) -> list[str]:
    """The faults of the rules for the calls of a function."""
    faults: list[str] = []
    with torch.no_grad():
        for call in calls.calls_of(function, tensors, {}):
            opinfo._check_call(call, random.Random(0), defaultdict(Counter), faults)
    return faults


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (F.linear, [(2, 5), (10, 5), (10,)]),
        (torch.matmul, [(4, 6), (2, 6, 4)]),
        (lambda x: x.softmax(0), [()]),
        (lambda x: F.layer_norm(x.reshape(4, 10), [10]).transpose(0, 1), [(2, 2, 10)]),
        (lambda x: torch.cat(x.split(2, 1), 0), [(3, 4)]),
        (lambda x: (x.squeeze(), x.squeeze(2), x.squeeze((1, 2))), [(5, 1, 5, 1)]),
        (lambda x: torch.take_along_dim(x, torch.tensor([[0, 2]]), 1), [(5, 5)]),
        (lambda x: x.gather(1, torch.tensor([[0, 2], [1, 1]])), [(5, 5)]),
        (lambda x: x.index_select(0, torch.tensor([0])), [()]),
        (lambda x: x.index_copy(0, torch.tensor([0]), x.reshape(1)), [()]),
        (lambda x, rows: x.index_copy(1, torch.arange(5), rows), [(3, 5), (3, 5)]),
        (lambda x: x.gather(0, torch.zeros(2, 0, dtype=torch.int64)), [(5,)]),
        (lambda x: F.embedding(torch.tensor([1, 9]), x), [(10, 3)]),
        (F.conv2d, [(3, 4, 4), (2, 3, 3, 3)]),
        (lambda x, weight: F.conv1d(x, weight, groups=4), [(4, 6), (4, 1, 3)]),
        (lambda x, weight: F.conv1d(x, weight, groups=3), [(3, 9, 6), (3, 3, 3)]),
        (lambda x, mean, variance: F.batch_norm(x, mean, variance.abs(), training=True), [(5, 4, 5), (4,), (4,)]),
        (lambda x: F.group_norm(x, 2), [(2, 6, 3)]),
        (torch.atleast_2d, [(4, 4)]),
        (lambda x: x.unsafe_split(2), [(4, 4)]),
        (lambda x: x.view(20, 5), [(5, 4, 5)]),
    ],
)
def test_rules_agree_on_a_call(function, shapes):
    assert faults_of(function, *(normal(*shape, seed=seed) for seed, shape in enumerate(shapes))) == []


def test_a_wrong_rule_of_each_kind_is_found(monkeypatch):
    monkeypatch.setitem(axis_rules.RULES, aten.cumsum.default, lambda node, known: known[node.args[0]])
    assert ["differs" in fault for fault in faults_of(lambda x: x.cumsum(0), normal(4, 3))] == [True]
    monkeypatch.setitem(flops.FORMULAS, aten.mm.default, lambda node, shape_of: 1)
    (found,) = faults_of(torch.mm, normal(2, 3), normal(3, 2))
    assert found.endswith("is counted as 2 operations, and PyTorch counts 24")
    monkeypatch.setitem(table.RULES, aten.flip.default, lambda node, read: Outcome(sharded(*read.of(node.args[0]).dims)))
    (found,) = faults_of(lambda x: x.flip(0), normal(4, 3))
    assert found.startswith("placement: aten.flip.default(float32[4, 3], [0]) with ") and "differs by" in found


def test_torch_export_examples_are_equal_or_refused():
    items = {item.name: item for item in export_examples.items(False)}
    assert len(items) > 30
    assert checked(export_examples.check, items["CondPredicate"])["result"] == "equal"
    refused = checked(export_examples.check, items["UserInputMutation"])
    assert refused["result"] == "refused" and "changes its argument 'x' in place" in refused["reason"]


class Unsure(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(3)


def test_a_program_that_returns_something_else_is_no_pass():
    assert check_model(Unsure(), ((normal(2, 3),), {}))["result"] != "equal"


ONNX = """
    <ir_version: 10, opset_import: ["" : 20]>
    graph (float[2] x) => (float[2] y) { y = %s (x) }"""


@pytest.mark.parametrize(
    ("operator", "result", "reason"),
    [("Relu", "passed", ""), ("Neg", "wrong", "output 0 differs by 2"), ("Bernoulli", "refused", "conversion of Bernoulli")],
)
def test_an_onnx_test_passes_or_says_why_not(tmp_path, operator, result, reason):
    onnx.save(onnx.parser.parse_model(ONNX % operator), tmp_path / "model.onnx")
    ones = normal(2).fill_(1).numpy()
    found = onnx_backend._run(tmp_path / "model.onnx", [([ones], [ones])], 0.0, 0.0)
    assert found["result"] == result and reason in found.get("reason", "")


def test_a_small_model_of_timm_is_equal():
    pytest.importorskip("timm")
    names = {item.name: item for item in timm_models.items(False)}
    assert len(names) > 90 and names["test_vit"].family == "vision_transformer"
    assert checked(timm_models.check, names["test_vit"])["result"] == "equal"


def test_a_section_takes_the_place_of_the_one_before(tmp_path):
    item = Item("one", "family", dict)
    suite = Suite(
        "Things", "They are things.\n", "things", lambda everything: [item], lambda item, report: None, lambda: None,
        {"good": "as it should be", "bad": "not so"}, frozenset({"bad", "failure"}), {"one": "it is old"},
    )  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n## Things\n\nold\n\n## Others\n\nkept\n")
    put_section(page, section(suite, [{"name": "one", "result": "bad", "reason": "wrong"}]))
    text = page.read_text()
    assert text.startswith("# Page\n\n## Things\n\nThey are things.") and text.endswith("\n\n## Others\n\nkept\n")
    assert "| `one` | bad | it is old |" in text and "old\n\n## Others" not in text.partition("it is old")[0]
    assert headline(suite, [{"name": "one", "result": "bad"}]) == "Of 1 things: 1 bad."
    assert surprises(suite, [{"name": "one", "result": "bad"}]) == []
    assert surprises(suite, [{"name": "one", "result": "good"}]) == ["one has no fault now; take it out of known.py"]
    assert surprises(suite, [{"name": "two", "failed": "run", "error": "it died"}]) == ["two: failure: it died"]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("suite", "items"),
    [
        ("opinfo", ["softmax", "nn.functional.linear", "sum"]),
        ("export", ["CondPredicate", "FnWithKwargs"]),
        ("onnx", ["test_abs", "test_operator_mm", "test_loop11"]),
        ("timm", ["test_vit"]),
    ],
)
def test_the_command_runs_items_and_writes_their_section(tmp_path, suite, items):
    pytest.importorskip("expecttest" if suite == "opinfo" else "torch", reason="its samples need expecttest")
    page, output = tmp_path / "page.md", tmp_path / "records.json"
    arguments = [suite, "--only", *items, "--jobs", "1", "--output", str(output), "--page", str(page)]
    assert __main__.main(arguments) == 0
    assert f"## {__main__.suite_of(suite).title}" in page.read_text()
    assert len(output.read_text().splitlines()) == len(items)
