"""Artifacts of a backend of another package: loaded with the backend as an object, pickled and copied with it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import lissom
from lissom.backends.eager.backend import Eager
from lissom.errors import ArtifactError, UnsupportedError
from tests.support.external import Plain
from tests.support.models import feed_forward


@pytest.fixture(scope="module")
def plain():
    case = feed_forward()
    return case, lissom.compile(case.model, case.inputs, backend=Plain())


def test_it_is_loaded_with_the_backend_as_an_object(plain, tmp_path):
    case, model = plain
    model.save(tmp_path / "model")
    again = lissom.load(tmp_path / "model", backend=Plain(note="other"))
    assert again.backend == "plain" and torch.equal(again(*case.args), model(*case.args))
    again.save(tmp_path / "again")
    for backend in (None, "plain", "eager"):
        with pytest.raises(
            ArtifactError,
            match=r"was made by a backend 'plain'; this Lissom has eager, .*; pass a backend of another package as an object, "
            "backend=",
        ):
            lissom.load(tmp_path / "model", backend=backend)
    with pytest.raises(UnsupportedError, match="was saved for backend 'plain', and backend= is 'eager'"):
        lissom.load(tmp_path / "model", backend=Eager())


def test_it_is_pickled_and_copied_with_its_backend(plain):
    case, model = plain
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert again.backend == "plain" and again.external_backend == Plain()
        assert torch.equal(again(*case.args), model(*case.args))


def test_an_option_that_json_cannot_hold_is_refused(tmp_path):
    case = feed_forward()
    for value, kind in ((torch.float32, "dtype"), ({1, 2}, "set"), (b"1", "bytes")):
        model = lissom.compile(case.model, case.inputs, backend=Plain(note=value))
        with pytest.raises(
            ArtifactError, match=f"option 'note' of backend 'plain' is a {kind}, and an artifact holds numbers, "
        ):
            model.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
