"""Tests of lissom.backends: the table of ways out."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from lissom.backends import BACKENDS, find_backend, find_backends
from lissom.backends.base import Backend, confirm
from lissom.backends.eager.backend import Eager
from lissom.backends.inductor import Inductor
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.backends.openvino.backend import OpenVino
from lissom.compiler.verify import rounding
from lissom.compiler.verify.rounding import exact_outputs
from lissom.errors import UnsupportedError
from lissom.frontends.capture.export import capture
from tests.support.models import normal


def test_a_backend_is_found_by_its_name():
    assert isinstance(find_backend("eager"), Eager)
    assert isinstance(find_backend("inductor"), Inductor)


def test_fastest_stands_for_all_that_run_in_one_process():
    assert [type(backend) for backend in find_backends("fastest")] == [Eager, Inductor, OnnxRuntime, OpenVino]
    assert {name for name, backend in BACKENDS.items() if backend.runs_ranks} == {"distributed"}
    assert [type(backend) for backend in find_backends("eager")] == [Eager]


def test_every_backend_is_listed_under_its_name():
    assert all(backend.name == name and issubclass(backend, Backend) for name, backend in BACKENDS.items())


def test_a_mistyped_backend_is_refused_with_the_nearest():
    with pytest.raises(UnsupportedError) as caught:
        find_backend("eagre")
    assert str(caught.value).startswith("there is no backend 'eagre'; did you mean 'eager'? choose eager, ")


def test_an_unknown_backend_is_refused_with_all():
    with pytest.raises(UnsupportedError) as caught:
        find_backend("zebra")
    assert str(caught.value).startswith("there is no backend 'zebra'; choose eager, ")


class Cancelling(nn.Module):
    """Returns its input twice, each time with most of the bits of float32 lost."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x + 3e4) - 3e4, (x + 2e4) - 2e4


def test_wider_dtype_runs_once_per_sample(monkeypatch):
    found = capture(Cancelling(), (normal(2, 3),))
    runs = []
    monkeypatch.setattr(
        rounding,
        "exact_outputs",
        lambda program, samples: runs.append(samples[0][0].shape) or exact_outputs(program, samples),
    )
    # One step of float32 at 3e4 is 2e-3, far above what two correct programs may differ by.
    assert confirm("exact", lambda inputs: [inputs[0].clone(), inputs[0].clone()], found.program, found.example) > 1e-4
    assert len(runs) == len(set(runs)) > 1


def test_a_backend_has_a_name_of_its_own():
    class Nameless(Backend):
        def build(self, program, example):
            return program.run

    class Second(Eager):
        """Inherits the name."""

    class Fastest(Nameless):
        name: ClassVar[str] = "fastest"

    with pytest.raises(UnsupportedError, match="the backend Nameless has no name; give its class one"):
        find_backend(Nameless())
    for backend, name in ((Second(), "eager"), (Fastest(), "fastest")):
        sentence = f"the backend {type(backend).__name__} has the name '{name}', which is taken; give its class another name"
        with pytest.raises(UnsupportedError, match=sentence):
            find_backend(backend)
