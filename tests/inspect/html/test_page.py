"""Tests of lissom.inspect.html and Report.to_html."""

import dataclasses
import math
import re
import sys
import time

import pytest
import torch
import transformers
from torch import nn

import lissom
from lissom.compiler.analysis.cost import cost, example_sizes
from lissom.compiler.pipeline.history import History
from lissom.errors import ArtifactError, RequirementError
from lissom.inspect.report import Report, write_stopped
from tests.support.models import tiny_llama
from tests.support.page_reading import costs_of, data_of, texts_of, written

PRUNED = "prune-heads{keep=0.75},quantize{scheme=int8-dynamic}"


@pytest.fixture(scope="module")
def pruned(minilm):
    return lissom.compile(minilm.model, minilm.example_inputs, passes=PRUNED, checks="structural", goal=None)


def test_the_page_holds_every_program(pruned, tmp_path):
    assert texts_of(data_of(written(pruned.report, tmp_path))) == pruned.report.history.texts


def test_the_page_holds_every_program_of_a_decoder(tmp_path):
    case = tiny_llama()
    compiled = lissom.compile(case.model, case.inputs, checks="structural")
    assert texts_of(data_of(written(compiled.report, tmp_path))) == compiled.report.history.texts


def test_the_page_has_the_cost_of_every_node(pruned, tmp_path):
    found = costs_of(data_of(written(pruned.report, tmp_path)))
    wanted = cost(pruned.program, example_sizes(pruned.program))
    figures = {f"%{n.name}": [c.flops, c.read_bytes, c.written_bytes, c.parameters] for n, c in wanted.items()}
    assert {name: figure for name, figure in found.items() if name.startswith("%")} == figures


def test_costs_of_step_are_those_of_its_program(minilm):
    found = lissom.optimize(minilm.model, minilm.example_inputs, passes="low-rank{budget=0.5}", checks="structural")
    last = found.report.history.facts_of(len(found.report.history.steps) - 1)
    costs = {f"%{node.name}": item for node, item in cost(found.program, example_sizes(found.program)).items()}
    assert {name: fact.cost for name, fact in last.items() if name[0] == "%"} == costs


def test_a_step_that_changes_weights_alone_is_seen(pruned):
    history = pruned.report.history
    index = next(step.index for step in history.steps if step.spelling.startswith("prune-heads"))
    name = "@encoder.layer.3.attention.output.dense.weight"
    assert history.texts[index] == history.texts[index - 1]
    passes = [history.facts_of(at)[name].origin.passes for at in (index - 1, index)]
    assert ["prune-heads" in item for item in passes] == [False, True]


def test_the_data_names_what_every_step_did(pruned, tmp_path):
    data = data_of(written(pruned.report, tmp_path))
    step = next(item for item in data["steps"] if item["spelling"].startswith("prune-heads"))
    assert step["kind"] == "approximation" and "encoder.layer.3" in step["perSite"] and step["about"]
    assert [item["size"][0] for item in data["steps"]] == [item.size.nodes for item in pruned.report.history.steps]
    assert data["times"] is None and "kernels()" in data["missing"][0]


def test_the_page_needs_no_network(pruned, tmp_path):
    page = written(pruned.report, tmp_path)
    assert re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+", page) == []
    assert "default-src 'none'" in page


class Hostile(nn.Module):
    """Modules with names that are markup."""

    names = ("</script><script>alert(1)</script>", "<!-- <b>", "a\nb", "{{data}}", "x  # y", '"%&')

    def __init__(self) -> None:
        super().__init__()
        for name in self.names:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


def test_names_stay_text(tmp_path):
    compiled = lissom.optimize(Hostile(), torch.randn(2, 4), checks="structural")
    page = written(compiled.report, tmp_path)
    assert texts_of(data_of(page)) == compiled.report.history.texts
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "<!--" not in page
    title = Report("<img src=x onerror=alert(1)>", compiled.report.history)
    assert "<img" not in written(title, tmp_path) and "<img" not in title._repr_html_()


def test_times_are_on_the_page_once_they_are_measured(tmp_path):
    model = nn.Linear(64, 32)
    compiled = lissom.compile(model, torch.randn(8, 64))
    compiled.report.kernels()
    compiled.report.errors()
    data = data_of(written(compiled.report, tmp_path))
    assert data["times"]["nodes"].keys() == {f"%{node.name}" for node in compiled.program.nodes()}
    assert data["errors"]["nodes"].keys() <= data["times"]["nodes"].keys() and data["errors"]["lost"] == {}
    assert data["missing"] == []


def test_a_loaded_model_has_a_page(tmp_path):
    compiled = lissom.compile(nn.Linear(64, 32), torch.randn(8, 64))
    compiled.save(tmp_path / "saved")
    loaded = lissom.load(tmp_path / "saved")
    assert data_of(written(loaded.report, tmp_path)) == data_of(written(compiled.report, tmp_path))
    assert loaded.report.to_svg(compare=0) == compiled.report.to_svg(compare=0)


def test_an_artifact_of_an_earlier_version_has_a_page(tmp_path):
    """They keep the texts of the programs, and the facts of no step."""
    compiled = lissom.compile(nn.Linear(64, 32), torch.randn(8, 64))
    compiled.save(tmp_path / "saved")
    loaded = lissom.load(tmp_path / "saved")
    history = History.from_json(loaded.report.history.to_json(), loaded.report.history.texts)
    data = data_of(written(dataclasses.replace(loaded.report, history=history), tmp_path))
    assert texts_of(data) == compiled.report.history.texts
    assert costs_of(data)["%packed_linear"][0] == 2 * 8 * 64 * 32
    assert "an artifact of an earlier version keeps no more" in data["missing"][0]


def test_a_history_that_an_error_ended_has_a_page(tmp_path):
    with pytest.raises(RequirementError) as caught:
        passes = "quantize{scheme=int8-weight},sparsify{keep=0.5}"
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        lissom.optimize(model, torch.randn(2, 64), passes=passes, checks="structural")
    write_stopped(tmp_path / "a.html", "Linear", caught.value.history, str(caught.value))
    data = data_of((tmp_path / "a.html").read_text())
    assert data["missing"][0].startswith("The compile stopped") and "sparsify" in data["missing"][0]
    write_stopped(tmp_path / "b.html", "Linear", History("", "off"), "it was interrupted")
    assert not (tmp_path / "b.html").exists()


def test_a_page_that_cannot_be_written_is_refused(pruned, tmp_path):
    with pytest.raises(ArtifactError, match="it is a directory; name a file in it"):
        pruned.report.to_html(tmp_path)


def test_a_notebook_shows_the_report(pruned):
    shown = pruned._repr_html_()
    assert shown.startswith("<pre") and "prune-heads" in shown and len(shown) < 5000


@pytest.mark.slow
def test_the_page_of_a_deep_model_is_small(tmp_path):
    config = transformers.BertConfig(
        num_hidden_layers=96, hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=50
    )
    inputs = {"input_ids": torch.randint(0, 50, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    compiled = lissom.compile(
        transformers.BertModel(config).eval(), inputs, passes="quantize", checks="structural", goal=None, dynamic=False
    )
    started = time.process_time()
    page = written(compiled.report, tmp_path)
    assert time.process_time() - started < 5
    assert len(page) < 2_000_000
    data = data_of(page)
    assert texts_of(data) == compiled.report.history.texts
    # The first layers read what no other does; the most fold.
    assert max(len(group[0]) for group in data["folds"][data["steps"][-1]["fold"]]["encoder.layer"]) >= 94


class Chooser(nn.Module):
    """Numbers, and the index of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.head(torch.relu(self.layer(x)))
        return y, y.argmax(-1)


def test_an_error_without_end_is_a_number(tmp_path):
    """An index that differs has no finite relative error, and JSON has no infinity."""
    found = lissom.optimize(Chooser(), torch.randn(64, 8), passes="low-rank{rank=1}", checks="numeric")
    assert any(step.relative_error == math.inf for step in found.report.history.steps)
    page = data_of(written(found.report, tmp_path))
    assert max(step["error"] or 0 for step in page["steps"]) == sys.float_info.max


def test_a_module_named_as_a_property_of_every_object(tmp_path):
    model = nn.Sequential()
    model.add_module("constructor", nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    found = lissom.optimize(model, torch.randn(2, 4), checks="structural")
    assert texts_of(data_of(written(found.report, tmp_path))) == found.report.history.texts
