"""Tests of native code in artifacts: loaded only when it is allowed, and named where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import lissom
from lissom.artifacts.artifact import PROGRAM
from lissom.artifacts.manifest import NAME, Content, read_manifest
from lissom.backends.inductor import MADE_WITH, PACKAGE, Inductor
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.cli.main import app
from lissom.errors import ArtifactError
from lissom.runtime.compiled_model import CompiledModel
from tests.artifacts.test_directory import rewrite
from tests.support.models import feed_forward, normal
from tests.support.saving import compiled

PACKAGED = (
    "'DIR' would load the library in model.pt2, which TorchInductor compiled, and that is code which can do whatever you can; "
    "if you trust who made it, allow it: allow_native=True, or --allow-native on the command line"
)


@pytest.fixture(scope="module")
def runtimes(tmp_path_factory):
    """An artifact of the backend onnxruntime."""
    case = feed_forward()
    path = tmp_path_factory.mktemp("runtimes") / "artifact"
    lissom.compile(case.model, case.inputs, backend=OnnxRuntime(threads=1, timing_seconds=0.0)).save(path)
    return path


@pytest.fixture
def forged(tmp_path):
    """An artifact that says it is Inductor's, whose package is of bytes that load nowhere."""
    path = tmp_path / "artifact"
    compiled("feed_forward").save(path)
    (path / PACKAGE).write_bytes(b"no library")
    write_made_with(path, {"torch": torch.__version__, "instruction_sets": []})
    return path


def write_made_with(path: Path, data: object) -> None:
    (path / MADE_WITH).write_text(json.dumps(data))
    files = {item.name: Content.of(item) for item in path.iterdir() if item.name != NAME}
    rewrite(path, backend="inductor", options={}, files=files)


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(ArtifactError) as caught:
        lissom.load(path, **options)
    return str(caught.value).replace(str(path), "DIR")


def set_options(path: Path, **changes: object) -> None:
    rewrite(path, options=dict(read_manifest(path / NAME).options) | changes)


def test_compiled_library_is_loaded_only_when_it_is_allowed(forged, monkeypatch):
    opened = []
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *args, **kwargs: opened.append(args))
    assert refusal(forged) == PACKAGED
    # The backend is the caller's; the library is the artifact's all the same.
    assert refusal(forged, backend=Inductor()) == PACKAGED
    assert not opened
    with pytest.raises(AttributeError):
        lissom.load(forged, allow_native=True)
    assert opened == [(str(forged / PACKAGE),)]


def test_the_command_line_names_the_option(forged, tmp_path):
    np.savez(tmp_path / "data.npz", input=np.zeros((1, 1, 8), np.float32))
    for command in (
        ("run", str(forged), "--input", str(tmp_path / "data.npz")),
        ("show", str(forged)),
        ("bench", str(forged), "--shapes", "1x1", "--seconds", "0"),
    ):
        error = CliRunner().invoke(app, command).exception
        assert str(error).replace(str(forged), "DIR") == PACKAGED
        error = CliRunner().invoke(app, [*command, "--allow-native"]).exception
        assert isinstance(error, ArtifactError)
        assert "model.pt2' cannot be opened: " in str(error)


@pytest.mark.parametrize(
    "data", [7, [], {}, {"torch": torch.__version__}, {"torch": torch.__version__, "instruction_sets": 7}, {"torch": None}]
)
def test_a_library_made_with_nobody_knows_what_is_refused(forged, data):
    write_made_with(forged, data)
    said = refusal(forged, allow_native=True)
    assert said.startswith(("'DIR/inductor.json' does not say what the model was compiled with (", "'DIR' was compiled by"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"provider_options": {"CUDAExecutionProvider": {"gpu_external_alloc": "140000"}}},
            "what the option 'gpu_external_alloc' of CUDAExecutionProvider names, '140000'",
        ),
        (
            {"provider_options": {"CPUExecutionProvider": {"device_id": "/tmp/lib.so"}}},
            "what the option 'device_id' of CPUExecutionProvider names, '/tmp/lib.so'",
        ),
        (
            {"providers": ["QNNExecutionProvider"], "provider_options": {"QNNExecutionProvider": {"backend_path": "x.so"}}},
            "the execution provider 'QNNExecutionProvider' of ONNX Runtime",
        ),
        (
            {"provider_options": {"TensorrtExecutionProvider": {"trt_extra_plugin_lib_paths": "x.so"}}},
            "the execution provider 'TensorrtExecutionProvider' of ONNX Runtime",
        ),
    ],
)
def test_options_that_may_name_a_library_are_refused(runtimes, options, named):
    plain = dict(read_manifest(runtimes / NAME).options)
    try:
        set_options(runtimes, **options)
        assert refusal(runtimes) == PACKAGED.replace("the library in model.pt2, which TorchInductor compiled", named)
        # The caller's own options are taken in place of the artifact's.
        assert lissom.load(runtimes, backend=OnnxRuntime(threads=1)).backend == "onnxruntime"
    finally:
        rewrite(runtimes, options=plain)
    assert lissom.load(runtimes).backend == "onnxruntime"


def test_options_that_name_nothing_are_taken(runtimes):
    plain = dict(read_manifest(runtimes / NAME).options)
    try:
        set_options(runtimes, provider_options={"CPUExecutionProvider": {"arena_extend_strategy": "kSameAsRequested"}})
        model = lissom.load(runtimes)
    finally:
        rewrite(runtimes, options=plain)
    assert isinstance(model, CompiledModel) and model(normal(1, 2, 8)).shape[:2] == (1, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threads": 10**9}, "threads is 1000000000, and 1024 are the most"),
        ({"threads": "2"}, "threads is '2', and 1024 are the most"),
        ({"threads": True}, "threads is True, and 1024 are the most"),
        ({"providers": "CPUExecutionProvider"}, "providers are no list of names"),
        ({"providers": [7]}, "providers are no list of names"),
        ({"provider_options": ["x"]}, "provider_options are no table of tables"),
        ({"provider_options": {"CPUExecutionProvider": "x"}}, "provider_options are no table of tables"),
    ],
)
def test_options_of_another_kind_are_refused(runtimes, options, said):
    plain = dict(read_manifest(runtimes / NAME).options)
    try:
        set_options(runtimes, **options)
        assert refusal(runtimes) == f"'DIR' has options of backend 'onnxruntime' that this Lissom lacks: {said}"
    finally:
        rewrite(runtimes, options=plain)


def test_data_alone_needs_no_permission(tmp_path):
    compiled("feed_forward").save(tmp_path / "artifact")
    assert (tmp_path / "artifact" / PROGRAM).is_file()
    assert lissom.load(tmp_path / "artifact").backend == "eager"
