"""Tests of lissom.runtime.layer_timer: the kernels a report names, on real calls of small models."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

import lissom
from lissom.backends.inductor import Inductor
from lissom.errors import InputError, UnsupportedError
from lissom.measure import choice, machine
from lissom.ops.native import load_kernels
from lissom.runtime import layer_timer
from lissom.torch_compile import dynamo_reports
from tests.measure.test_machine import example
from tests.support import captures
from tests.support.models import FeedForward, captured, counter, normal, tiny_bert


@pytest.fixture(autouse=True)
def shortly(monkeypatch):
    monkeypatch.setattr(layer_timer, "_SECONDS", 0.0)
    monkeypatch.setattr(layer_timer, "load_machine", example)


@pytest.mark.parametrize("passes", ["exact", "quantize"])
def test_hot_layers_take_most_of_the_time(passes):
    case = tiny_bert()
    found = captures.compile(case.model, case.inputs, checks="off", passes=passes).report.kernels()
    shares = [found.share([layer]) for layer in found.layers]
    assert all(share >= 0 for share in shares) and sum(shares) == pytest.approx(1.0)
    assert len(found.hot) <= 8
    assert all(layer.milliseconds > 0 and (layer.roof_ms or 0.0) >= 0 for layer in found.hot)
    operators = {layer.kernel.operator for layer in found.layers}
    own = {"exact": "packed_linear", "quantize": "quantized_linear"}[passes]
    assert load_kernels() or own in operators


def test_other_inputs_than_the_example_can_be_timed():
    report = captures.compile(FeedForward(), normal(2, 5, 8), checks="off").report
    assert report.kernels().title == "FeedForward on eager, batch 2, sequence 5"
    assert report.kernels(x=normal(3, 7, 8)).title == "FeedForward on eager, batch 3, sequence 7"
    with pytest.raises(InputError, match="argument 'x' has size 9"):
        report.kernels(normal(3, 7, 9))


def test_full_report_has_table_and_then_short_one_line():
    report = captures.compile(FeedForward(), normal(2, 5, 8), checks="off").report
    assert "hot layers" not in str(report)
    full = str(report.full())
    assert "hot layers of FeedForward on eager, batch 2, sequence 5: " in full
    assert all(len(line) <= 80 for line in full.splitlines())
    assert " % of the roofline" in " ".join(str(report).split())
    assert str(report.full()) == full


def test_a_layer_that_pytorch_runs_faster_is_named_so(monkeypatch, tmp_path):
    if load_kernels():
        pytest.skip(load_kernels())
    monkeypatch.setenv(choice.SWITCH, "measured")
    monkeypatch.setattr(choice, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(choice, "_measure", lambda *_: (2.0, 1.0))
    choice._times.cache_clear()
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 4)).eval()
    found = captures.compile(model, normal(64, 256), checks="off").report.kernels()
    choice._times.cache_clear()
    kernels = {layer.shape: str(layer.kernel) for layer in found.layers}
    assert kernels["64 × 256 → 512"] == "PyTorch linear, float32, measured faster"
    assert kernels["64 × 512 → 4"].startswith("Lissom packed_linear, ")


def test_without_ceilings_report_asks_for_them_and_measures_none(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(layer_timer, "load_machine", machine.load_machine)
    found = captures.compile(FeedForward(), normal(2, 5, 8), checks="off").report.kernels()
    assert "Run `lissom machine` once to see shares of the roofline." in " ".join(str(found).split())
    assert not [*tmp_path.rglob("machine-*")]


def test_loaded_model_is_timed_on_inputs_it_is_given(tmp_path):
    captures.compile(FeedForward(), normal(2, 5, 8), checks="off").save(tmp_path / "model")
    report = lissom.load(tmp_path / "model").report
    sentence = "FeedForward was loaded, and an artifact keeps no inputs to time its layers on; give the arguments of a call"
    with pytest.raises(UnsupportedError, match=sentence):
        report.kernels()
    assert f"kernels: {sentence}" in " ".join(str(report.full()).split())
    assert report.kernels(normal(3, 7, 8)).title == "FeedForward on eager, batch 3, sequence 7"
    assert "hot layers of FeedForward" in str(report.full())


def test_a_program_that_is_not_lowered_has_no_kernels():
    report = captures.optimize(FeedForward(), normal(2, 5, 8), checks="off").report
    with pytest.raises(UnsupportedError, match="FeedForward is not lowered for a backend, so no kernels run it"):
        report.kernels()
    assert "hot layers" not in str(report.full())


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs ONNX Runtime")
@pytest.mark.parametrize("build", [tiny_bert, counter])
def test_onnx_runtime_names_its_operators(build):
    case = build()
    backend = lissom.OnnxRuntime(timing_seconds=0.0)
    compiled = captures.compile(case.model, case.inputs, checks="off", backend=backend)
    state = [tensor.clone() for tensor in compiled.state().values()]
    found = compiled.report.kernels()
    assert all(torch.equal(old, new) for old, new in zip(state, compiled.state().values(), strict=True))
    assert {layer.kernel.library for layer in found.layers} == {"ONNX Runtime"}
    assert sum(found.share([layer]) for layer in found.layers) == pytest.approx(1.0)
    assert "so no roofline is shown" in " ".join(str(found).split())
    if build is tiny_bert:
        (down,) = (item for item in found.layers if item.pattern == "encoder.layer.*.output.dense" and "→" in item.shape)
        assert (down.count, down.shape, str(down.kernel)) == (2, "10 × 24 → 16", "ONNX Runtime MatMul, float32")


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs ONNX Runtime")
def test_a_loaded_session_is_profiled_too(tmp_path):
    backend = lissom.OnnxRuntime(timing_seconds=0.0)
    captures.compile(FeedForward(), normal(2, 5, 8), checks="off", backend=backend).save(tmp_path / "model")
    report = lissom.load(tmp_path / "model").report
    assert report.kernels(normal(3, 7, 8)).title == "FeedForward on onnxruntime, batch 3, sequence 7"
    assert sorted(path.suffix for path in (tmp_path / "model").rglob("profile*")) == []


def test_backends_that_run_no_single_layers_say_so():
    program = captured("feed_forward")
    with pytest.raises(UnsupportedError, match="backend 'inductor' does not run the layers of FeedForward one by one"):
        Inductor().time_layers(program, program.run, [normal(2, 5, 8)], seconds=0.0, machine=None)


def test_reports_of_torch_compile_hold_no_program():
    with torch.no_grad():
        torch.compile(nn.Linear(4, 2).eval(), backend="lissom")(normal(3, 4))
    report = dynamo_reports()[-1].report
    assert report is not None and report.timer is None
