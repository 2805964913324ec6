"""Tests of lissom.inspect.plots and Report.plot."""

import dataclasses

import pytest
import torch
from torch import nn

import lissom
from lissom.errors import UnsupportedError
from lissom.inspect.pictures import new_figure
from lissom.inspect.plots import KINDS, Facts, _ceilings
from lissom.inspect.report import Report
from tests.measure.test_machine import example
from tests.support import captures
from tests.support.models import FeedForward, normal, seeded

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def compiled():
    return lissom.compile(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), torch.randn(2, 8, 64))


def drawn(report: Report, kind: str, folder) -> str:
    report.plot(kind, folder / f"{kind}.svg")
    return (folder / f"{kind}.svg").read_text(encoding="utf-8")


def test_the_roofline_has_every_hot_layer(compiled, tmp_path):
    times = compiled.report.kernels()
    machine = example()
    compiled.report.timer.known = dataclasses.replace(times, ceilings=machine.cpu)
    layer = times.layers[0]
    assert layer.flops == 2 * 16 * 64 * 128 and layer.moved_bytes > 4 * (64 * 128 + 16 * 64 + 16 * 128)
    assert "<svg" in drawn(compiled.report, "roofline", tmp_path)


def test_latency_is_drawn_once_it_was_timed(compiled, tmp_path):
    with pytest.raises(UnsupportedError, match=r"no lengths were timed, .*call report\.latency\(\) first"):
        compiled.report.plot("latency", tmp_path / "a.svg")
    found = compiled.report.latency((4, 8))
    assert [*found] == [4, 8] and all(timing.median_ms > 0 for timing in found.values())
    assert "<svg" in drawn(compiled.report, "latency", tmp_path)


def test_lengths_that_cannot_be_timed_are_refused(tmp_path):
    fixed = lissom.compile(nn.Linear(4, 2), torch.randn(3, 4), dynamic=False)
    with pytest.raises(UnsupportedError, match="all sizes of Linear are fixed"):
        fixed.report.latency()
    fixed.save(tmp_path / "saved")
    with pytest.raises(UnsupportedError, match="an artifact keeps no inputs to time"):
        lissom.load(tmp_path / "saved").report.latency()


def test_quality_is_drawn_over_the_work_that_is_left(tmp_path):
    found = captures.optimize(seeded(FeedForward), normal(2, 5, 8), passes="prune-neurons{keep=0.5},eliminate-dead")
    assert "<svg" in drawn(found.report, "quality", tmp_path)
    figure = KINDS["quality"](Facts("FeedForward", found.report.history))
    work, quality = figure.axes[0].lines[0].get_data()
    # Half of the neurons are zeroed by the lossy pass, and removed by the exact one after it.
    assert [*work] == [100.0, 50.0] and quality[0] == 1.0 > quality[1]


def test_what_a_report_has_no_data_for_is_refused(tmp_path):
    plain = captures.optimize(seeded(FeedForward), normal(2, 5, 8)).report
    for kind, sentence in {
        "roofline": r"no layers were timed, .* call report\.kernels\(\) first",
        "latency": r"call report\.latency\(\) first",
        "quality": "no lossy pass was measured, .* `prune-heads`",
        "training": "no training pass ran, .* `distill` or `finetune`",
        "rooflines": r"no plot 'rooflines'; did you mean 'roofline'\? it has roofline, latency, quality, training",
    }.items():
        with pytest.raises(UnsupportedError, match=sentence):
            plain.plot(kind, tmp_path / "a.svg")
    with pytest.raises(UnsupportedError, match="not lowered for a backend"):
        plain.latency()
    assert [*tmp_path.iterdir()] == []


def test_a_roofline_needs_ceilings(compiled, tmp_path):
    times = compiled.report.kernels()
    compiled.report.timer.known = dataclasses.replace(times, ceilings=None)
    with pytest.raises(UnsupportedError, match="lissom machine"):
        compiled.report.plot("roofline", tmp_path / "a.svg")


def test_the_ceilings_start_left_of_every_knee():
    """Also where all layers are bound by arithmetic."""
    _, (axes,) = new_figure()
    _ceilings(axes, example().cpu, [1e6])
    for line in axes.lines:
        x, y = line.get_data()
        assert list(x) == sorted(x) and list(y) == sorted(y)
