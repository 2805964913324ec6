"""Tests of lissom.frontends.capture.writes: which writes become outputs without a second trace; all compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import lissom
from tests.support.models import normal


class Keeps(nn.Module):
    """Keeps the mean of what it saw; `form` says how it reads and writes it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("last", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        view, updated = self.mean.view(2, 2), 0.9 * self.mean + 0.1 * x.mean(0)
        if self.form == "whole":
            self.mean.copy_(updated)
        elif self.form == "in place":
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        elif self.form == "twice":
            self.mean.copy_(updated)
            self.mean.copy_(self.mean + 1)
        elif self.form == "part":
            self.mean[:2] = updated[:2]
        elif self.form == "swapped":
            first = self.mean.clone()
            self.mean.copy_(self.last)
            self.last.copy_(first + x.mean(0))
        elif self.form == "aliased":
            self.mean.copy_(self.last)
            self.last.copy_(updated)
        if self.form == "view":
            self.mean.copy_(updated)
            return x + view.reshape(-1)
        return x * self.mean + self.last


FORMS = ("whole", "in place", "twice", "part", "swapped", "aliased", "view")


@pytest.mark.parametrize("form", FORMS)
def test_state_goes_from_call_to_call_as_in_the_model(form: str) -> None:
    model, inputs = Keeps(form).eval(), [normal(3, 4, seed=seed) for seed in range(4)]
    compiled = lissom.compile(model, inputs[0], goal=None)
    for x in inputs:
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("form", FORMS)
def test_writes_of_whole_buffers_are_traced_once(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[str] = []
    again = ExportedProgram.run_decompositions
    monkeypatch.setattr(
        ExportedProgram, "run_decompositions", lambda *args, **kwargs: traces.append(form) or again(*args, **kwargs)
    )
    lissom.optimize(Keeps(form).eval(), normal(3, 4), passes="exact")
    assert bool(traces) == (form != "whole")
