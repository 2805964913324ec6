"""Tests of the measured choice between our products and PyTorch's."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lissom.errors import InputError
from lissom.measure import choice
from lissom.ops.native import load_kernels
from tests.support import captures
from tests.support.models import normal

SHAPE = (torch.float32, 64, 256, 512)


@pytest.fixture(autouse=True)
def measured(monkeypatch, tmp_path):
    assert not load_kernels()
    monkeypatch.setenv(choice.SWITCH, "measured")
    monkeypatch.setattr(choice, "cache_folder", lambda: tmp_path)
    choice._times.cache_clear()
    yield
    choice._times.cache_clear()


@pytest.fixture
def slow(monkeypatch):
    """Measurements in which ours takes twice as long; the shapes that were measured."""
    found = []

    def measure(*shape: object) -> tuple[float, float]:
        found.append(shape)
        return 2.0, 1.0

    monkeypatch.setattr(choice, "_measure", measure)
    return found


def test_both_are_timed():
    ours, theirs = choice._measure(*SHAPE)
    assert 0 < ours < 1e3 and 0 < theirs < 1e3


def test_a_shape_is_measured_once_a_machine(slow, tmp_path):
    for _ in range(2):
        reason = choice.slower_than_pytorch(*SHAPE)
        assert reason == "PyTorch's product takes 1 ms for 64 rows here, and Lissom's kernel 2 ms"
        choice._times.cache_clear()  # as a new process has it
    assert slow == [SHAPE]
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == {"float32 64x256x512": [2.0, 1.0]}
    choice.slower_than_pytorch(torch.bfloat16, *SHAPE[1:])
    assert set(json.loads(file.read_text())) == {"float32 64x256x512", "bfloat16 64x256x512"}


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"float32 64x256x512": 3}', "\x00", "[" * 100_000, f'{{"x": [1{"0" * 400}, 1]}}']
)
def test_a_file_that_holds_something_else_is_replaced(slow, tmp_path, content):
    choice.slower_than_pytorch(*SHAPE)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    choice._times.cache_clear()
    assert choice.slower_than_pytorch(*SHAPE) is not None
    assert json.loads(file.read_text()) == {"float32 64x256x512": [2.0, 1.0]}


def test_without_a_cache_a_process_measures(slow, monkeypatch):
    def unusable():
        raise PermissionError("no")

    monkeypatch.setattr(choice, "cache_folder", unusable)
    assert choice.slower_than_pytorch(*SHAPE) is not None
    assert choice.slower_than_pytorch(*SHAPE) is not None
    assert slow == [SHAPE]


def test_small_calls_and_large_weights_are_ours_unmeasured(slow):
    assert choice.slower_than_pytorch(torch.float32, 2, 8, 8) is None
    assert choice.slower_than_pytorch(torch.float32, 2, 4096, 8192) is None
    assert slow == []


def test_the_switch(slow, monkeypatch):
    monkeypatch.setenv(choice.SWITCH, "ours")
    assert choice.slower_than_pytorch(*SHAPE) is None
    monkeypatch.setenv(choice.SWITCH, "theirs")
    with pytest.raises(InputError, match="LISSOM_KERNELS is 'theirs'; give measured or ours"):
        choice.slower_than_pytorch(*SHAPE)


def test_a_layer_whose_kernel_is_slower_stays_pytorchs(slow):
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 4)).eval()
    compiled = captures.compile(model, normal(64, 256))
    targets = [str(node.target) for node in compiled.program.nodes()]
    assert targets == ["aten.linear.default", "lissom.packed_linear.default"]
    reasons = [skip.reason for step in compiled.report.history.steps for skip in step.skipped if step.spelling == "pack-linear"]
    assert reasons == ["PyTorch's product takes 1 ms for 64 rows here, and Lissom's kernel 2 ms"]
