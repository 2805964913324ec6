"""What is wrong with the arguments of `load` and `save` is said in one sentence."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

import lissom
from lissom.errors import ArtifactError, LissomError, UnsupportedError
from tests.support.refusals import Refusal, check, table

X = torch.zeros(2, 4)


@cache
def compiled() -> lissom.CompiledModel:
    return lissom.compile(nn.Linear(4, 3), X)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "model"
    compiled().save(folder)
    return folder


LOADS: dict[str, tuple[type[LissomError], str, dict[str, object]]] = {
    "backend of another name": (
        UnsupportedError,
        "was saved for backend 'eager', and backend= is 'inductor'",
        {"backend": "inductor"},
    ),
    "backend unknown": (UnsupportedError, "backend= is 'eagr'; compile the model again", {"backend": "eagr"}),
    "backend a number": (UnsupportedError, "backend= is 1; give 'eager', or an object", {"backend": 1}),
    "backend a class": (UnsupportedError, "backend= is <class", {"backend": lissom.OnnxRuntime}),
    "device a fraction": (UnsupportedError, "device 1.5 is not known", {"device": 1.5}),
    "device absent": (UnsupportedError, "is not on this machine", {"device": "cuda:99"}),
}


@pytest.mark.parametrize("name", LOADS)
def test_load(name: str, artifact: Path) -> None:
    kind, text, options = LOADS[name]
    check((kind, text, lambda: lissom.load(artifact, **cast(Any, options))))


def test_a_backend_is_loaded_by_its_name(artifact: Path) -> None:
    loaded = lissom.load(artifact, backend="eager")
    assert torch.equal(cast(torch.Tensor, loaded(X)), cast(torch.Tensor, compiled()(X)))


PATHS: dict[str, Refusal] = {
    "load none": (ArtifactError, "the directory is None; give a path", lambda: lissom.load(cast(Any, None))),
    "load a number": (ArtifactError, "the directory is 1.5; give a path", lambda: lissom.load(cast(Any, 1.5))),
    "load too long": (ArtifactError, "cannot be looked up: File name too long", lambda: lissom.load("a" * 5000)),
    "load a zero byte": (ArtifactError, "cannot be looked up: embedded null byte", lambda: lissom.load("a\0b")),
    "load nothing": (ArtifactError, "nowhere", lambda: lissom.load("nowhere")),
    "load a file": (ArtifactError, "test_bad_loads.py", lambda: lissom.load(__file__)),
    "save none": (ArtifactError, "the directory is None; give a path", lambda: compiled().save(cast(Any, None))),
    "save too long": (ArtifactError, "cannot be looked up: File name too long", lambda: compiled().save("a" * 5000)),
    "save in nothing": (ArtifactError, "there is no directory", lambda: compiled().save("nowhere/model")),
}


@table(PATHS)
def test_paths(refusal: Refusal) -> None:
    check(refusal)
