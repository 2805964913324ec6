"""Tests of lissom.backends: the table of ways out."""

import pytest

from lissom.backends import BACKENDS, find_backend, find_backends
from lissom.backends.base import Backend
from lissom.backends.eager.backend import Eager
from lissom.backends.inductor import Inductor
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.errors import UnsupportedError


def test_a_backend_is_found_by_its_name():
    assert isinstance(find_backend("eager"), Eager)
    assert isinstance(find_backend("inductor"), Inductor)


def test_fastest_stands_for_all_that_run_in_one_process():
    assert [type(backend) for backend in find_backends("fastest")] == [Eager, Inductor, OnnxRuntime]
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
