"""Tests of loading: hashes of parts, weights that are checked while they are mapped, and a history that is read later."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import lissom
from lissom.artifacts import manifest
from lissom.artifacts.manifest import NAME, Content, read_manifest
from lissom.compiler.ir import fake
from lissom.errors import ArtifactError
from tests.artifacts.test_directory import FILES, refusal, rewrite
from tests.support.saving import compiled


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "artifact"
    compiled("bert").save(path)
    return path


@pytest.fixture
def saved(original, tmp_path):
    """A copy of an artifact."""
    return Path(shutil.copytree(original, tmp_path / "artifact"))


@pytest.fixture
def parted(original, tmp_path, monkeypatch):
    """An artifact whose weights are hashed in several parts."""
    monkeypatch.setattr(manifest, "PART_BYTES", 3000)
    path = Path(shutil.copytree(original, tmp_path / "parted"))
    rewrite(path, files={name: Content.of(path / name) for name in FILES[1:]})
    return path


def test_large_file_is_checked_by_its_parts(parted):
    content = read_manifest(parted / NAME).files["weights.safetensors"]
    assert len(content.parts) == -(-content.size // 3000) > 2
    assert lissom.load(parted).program.name == "BertModel"
    weights = (parted / "weights.safetensors").read_bytes()
    for place in (2999, 3000, content.size // 2, content.size - 1):
        changed = bytearray(weights)
        changed[place] ^= 1
        (parted / "weights.safetensors").write_bytes(changed)
        assert refusal(parted).startswith("'DIR/weights.safetensors' was changed after it was written: its SHA-256 is another")


def test_artifact_without_hashes_of_parts_loads(parted):
    files = read_manifest(parted / NAME).files
    rewrite(parted, files={name: Content(content.size, content.sha256) for name, content in files.items()})
    assert '"parts"' not in (parted / NAME).read_text()
    assert lissom.load(parted).program.name == "BertModel"


def test_wrong_number_of_parts_is_refused(parted):
    files = read_manifest(parted / NAME).files
    content = files["weights.safetensors"]
    rewrite(parted, files={**files, "weights.safetensors": Content(content.size, content.sha256, content.parts[:-1])})
    assert refusal(parted).endswith(
        f"a file of {content.size} bytes has {len(content.parts) - 1} hashes, one for every 3000 bytes; save the model again"
    )


@pytest.mark.parametrize("place", [0, 20, -1])
def test_changed_weights_are_named_whatever_their_reader_says(saved, place):
    path = saved / "weights.safetensors"
    changed = bytearray(path.read_bytes())
    changed[place] ^= 0xFF
    path.write_bytes(changed)
    assert refusal(saved) == (
        "'DIR/weights.safetensors' was changed after it was written: its SHA-256 is another; copy it again, or save again"
    )


def test_symbolic_values_are_made_when_they_are_asked_for(saved, monkeypatch):
    def refused(*_: object):
        raise AssertionError("a symbolic value was made")

    monkeypatch.setattr(fake, "symbolic_mode", refused)
    loaded = lissom.load(saved)
    ones = torch.ones(2, 5, dtype=torch.int64)
    assert loaded(input_ids=ones, attention_mask=ones).last_hidden_state.shape[:2] == (2, 5)
    with pytest.raises(AssertionError, match="a symbolic value was made"):
        assert loaded.program.fake_mode


def test_history_is_read_when_it_is_asked_for(saved, original):
    history = lissom.load(saved).report.history
    assert not {"texts", "changes"} & vars(history).keys() and history.steps[0].spelling == "capture"
    copied = pickle.loads(pickle.dumps(history))
    shutil.rmtree(saved)
    wanted = lissom.load(original).report.history
    assert "aten" in history.texts[0] and len(history.texts) == len(history.steps)
    assert history == wanted and copied == wanted
    assert not hasattr(history, "others")


def test_texts_without_facts_are_a_history(saved):
    (saved / "steps.json").write_text(json.dumps(["text"]))
    rewrite(saved, files={**read_manifest(saved / NAME).files, "steps.json": Content.of(saved / "steps.json")})
    history = lissom.load(saved).report.history
    assert history.texts == ["text"] and history.changes == {}


@pytest.mark.parametrize(
    ("steps", "said"),
    [({}, "KeyError: 'changes'"), (7, "not iterable"), ({"texts": [], "changes": {}}, "and 0 texts")],
    ids=str,
)
def test_history_that_is_none_is_refused_when_it_is_asked_for(saved, steps, said):
    (saved / "steps.json").write_text(json.dumps(steps))
    rewrite(saved, files={**read_manifest(saved / NAME).files, "steps.json": Content.of(saved / "steps.json")})
    history = lissom.load(saved).report.history
    for _ in range(2):
        with pytest.raises(ArtifactError) as caught:
            history.diff(0, 0)
        assert f"'{saved}' holds no history this Lissom can read: " in str(caught.value) and said in str(caught.value)
