"""Tests of lissom.runtime.pickled: copies of compiled models are whole models."""

from __future__ import annotations

import copy
import gc
import tempfile

import pytest
import torch

import lissom
from lissom.artifacts.packed import from_copy
from lissom.backends.base import Backend
from lissom.backends.inductor import Inductor
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.backends.openvino.backend import OpenVino
from lissom.errors import ArtifactError
from lissom.runtime.pickled import loaded_from
from tests.support.models import feed_forward
from tests.support.saving import compiled

WITH_OPENVINO = pytest.mark.skipif(OpenVino().missing() is not None, reason=str(OpenVino().missing()))


@pytest.mark.parametrize(
    "backend",
    [
        OnnxRuntime(timing_seconds=0),
        pytest.param(Inductor(), marks=pytest.mark.slow),
        pytest.param(OpenVino(), marks=WITH_OPENVINO),
    ],
    ids=lambda item: item.name,
)
def test_a_copy_of_a_copy_is_saved(backend: Backend, tmp_path):
    case = feed_forward()
    model = lissom.compile(case.model, case.inputs, backend=backend)
    copy.deepcopy(copy.deepcopy(model)).save(tmp_path / "model")
    again = lissom.load(tmp_path / "model", allow_native=True)
    assert torch.equal(again(*case.args), model(*case.args))


@pytest.mark.slow
def test_the_files_of_a_copy_go_with_it(tmp_path, monkeypatch):
    model = compiled("feed_forward")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    again = copy.deepcopy(model)
    assert len(list(tmp_path.iterdir())) == 1
    del again
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_copy_without_room_is_a_sentence(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    said = "^there is no room for a copy of the model: No space left on device; set TMPDIR to a directory with room$"
    with pytest.raises(ArtifactError, match=said):
        from_copy(refuse, lissom.load)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ArtifactError, match="there is no room for a copy of the model: No such file or directory; "):
        loaded_from({}, lissom.load)
