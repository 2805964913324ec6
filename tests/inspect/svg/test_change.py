"""Tests of lissom.inspect.svg.change, and of lissom.draw."""

import pytest
import torch
from torch import nn

import lissom
from lissom.errors import UnsupportedError
from lissom.inspect.svg.change import change_svg
from tests.support.svg_reading import boxes, parsed, texts


class Normed(nn.Module):
    """An RMS norm in parts between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))


@pytest.fixture(scope="module")
def history():
    return lissom.optimize(Normed(), torch.randn(2, 8), passes="sparsify{keep=0.5}", checks="structural").report.history


def step_of(history, name):
    return next(step.index for step in history.steps if step.spelling.startswith(name))


def test_the_changed_nodes_are_drawn_before_and_after(history):
    picture = change_svg(history, step_of(history, "raise-rms-norm"), "raise-rms-norm")
    words = texts(picture)
    assert {"before", "after raise-rms-norm", "rsqrt", "mean.dim", "rms_norm"} <= set(words)
    removed, changed, added = (boxes(picture, kind) for kind in ("removed", "changed", "added"))
    assert len(removed) == 5 and len(changed) == 2 and not added
    # The layers around it are values, which nodes read.
    assert words.count("linear") == 2 and not boxes(picture, "node")
    assert len(picture) < 7000


def test_the_two_programs_do_not_overlap(history):
    picture = change_svg(history, step_of(history, "raise-rms-norm"), "raise-rms-norm")
    places = [place for _, place in boxes(picture, "removed", "changed", "added", "value")]
    width, height = (float(parsed(picture).get(name)) for name in ("width", "height"))
    for index, (left, top, right, bottom) in enumerate(places):
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        for other in places[index + 1 :]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top


def test_a_step_that_changes_weights_alone_has_none(history):
    assert change_svg(history, step_of(history, "sparsify"), "sparsify") is None


def test_a_program_is_drawn_without_a_report(tmp_path):
    model, inputs = Normed(), torch.randn(2, 8)
    first = lissom.optimize(model, inputs, checks="structural").program
    last = lissom.optimize(model, inputs, passes="quantize", checks="structural").program
    picture = lissom.draw(last, tmp_path / "a.svg", compare=first)
    assert (tmp_path / "a.svg").read_text() == picture
    # A layer of eight outputs is left in floating point.
    assert len(boxes(picture, "changed")) == 1 and len(boxes(picture, "added")) == 2
    assert not boxes(lissom.draw(last), "changed", "added")
    with pytest.raises(UnsupportedError, match="Normed has no node in the module 'middle'"):
        lissom.draw(last, only="middle")
