"""Tests of lissom.artifacts.packed: artifacts in one file, and as links into a cache."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lissom
from lissom.artifacts.packed import copy_linked, load_linked, load_packed, pack
from lissom.errors import ArtifactError
from tests.artifacts.saving import compiled

WEIGHTS = "weights.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "artifact"
    compiled("feed_forward").save(path)
    return path


@pytest.fixture
def linked(original, tmp_path):
    """An artifact whose files are links."""
    folder = tmp_path / "linked"
    folder.mkdir()
    for path in original.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def replace(name: str, target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def pipe(folder: Path) -> None:
    os.mkfifo(folder.parent / "pipe")
    replace(WEIGHTS, "../pipe")(folder)


def longer(folder: Path) -> None:
    (folder.parent / "longer").write_bytes((folder / WEIGHTS).read_bytes() + b"x")
    replace(WEIGHTS, "../longer")(folder)


def test_links_are_followed(linked):
    x = torch.ones(2, 5, 8)
    assert torch.equal(load_linked(linked, lissom.load)(x), compiled("feed_forward")(x))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replace(WEIGHTS, "/dev/zero"), "weights.safetensors' is not a regular file; an artifact holds regular files only"),
        (pipe, "weights.safetensors' is not a regular file"),
        (longer, "weights.safetensors' has [0-9]+ bytes, and had [0-9]+ when written"),
        (replace(WEIGHTS, "nowhere"), "lacks 'weights.safetensors'"),
        (replace(WEIGHTS, WEIGHTS), "weights.safetensors' is a symbolic link|Too many levels of symbolic links"),
        (replace("more", "/dev/zero"), "holds 'more', which its manifest does not name"),
        (replace("more", "more"), "holds 'more', which its manifest does not name"),
        (lambda folder: (folder / "more").mkdir(), "holds 'more', which its manifest does not name"),
        (replace("manifest.json", "/dev/zero"), "manifest.json' is not a regular file"),
    ],
)
def test_only_files_of_the_manifest_are_copied(linked, change, said):
    change(linked)
    with pytest.raises(ArtifactError, match=said):
        load_linked(linked, lissom.load)


def test_a_copy_that_does_not_fit_on_the_disk_is_refused(linked, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "copy").mkdir()
    copy_linked(linked, tmp_path / "copy")
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())
    assert lissom.load(tmp_path / "copy").program.name == "FeedForward"
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    (tmp_path / "full").mkdir()
    with pytest.raises(ArtifactError, match=r"' takes \d+ bytes, and 100 are free in '.*'; make room there$"):
        copy_linked(linked, tmp_path / "full")


def archive(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "{}" * 100)
    return path


def patched(old: bytes, offset: int, new: bytes) -> Callable[[bytes], bytes]:
    """Other bytes so many after the last `old`."""

    def patch(content: bytes) -> bytes:
        start = content.rfind(old) + offset
        return content[:start] + new + content[start + len(new) :]

    return patch


def not_utf8(content: bytes) -> bytes:
    content = content.replace(b"manifest.json", b"man\xff\xfeest.json")
    for start, offset in ((b"PK\x03\x04", 7), (b"PK\x01\x02", 9)):
        content = patched(start, offset, b"\x08")(content)
    return content


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (not_utf8, "'utf-8' codec can't decode"),
        (lambda content: content[: len(content) // 2], "File is not a zip file"),
        (patched(b"PK\x01\x02", 42, b"\xff\xff\xff\x7f"), "holds no program of Lissom: "),
        (patched(b"PK\x05\x06", 16, b"\xff\xff\xff\x7f"), "holds no program of Lissom: "),
        (patched(b"PK\x01\x02", 20, b"\x04\0\0\0\x04\0\0\0"), "holds no program of Lissom: "),
        (patched(b"PK\x01\x02", 24, b"\xff\xff\xff\x7f"), "its sizes or names are wrong"),
    ],
)
def test_a_damaged_file_is_a_sentence(tmp_path, change, said):
    path = archive(tmp_path / "model.lissom", "manifest.json")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ArtifactError, match=said):
        load_packed(path, lissom.load)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_two_files_of_one_name_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="holds no program of Lissom: its sizes or names are wrong; export the model again"):
        load_packed(archive(tmp_path / "model.lissom", "manifest.json", "manifest.json"), lissom.load)


def test_a_file_without_an_end_is_refused(tmp_path):
    (tmp_path / "model.lissom").symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match="is not a regular file"):
        load_packed(tmp_path / "model.lissom", lissom.load)


def test_a_packed_model_that_does_not_fit_on_the_disk_is_refused(tmp_path, monkeypatch):
    pack(compiled("feed_forward").save, tmp_path / "model.lissom")
    assert load_packed(tmp_path / "model.lissom", lissom.load).program.name == "FeedForward"
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ArtifactError, match=r"model\.lissom' takes \d+ bytes, and 100 are free in "):
        load_packed(tmp_path / "model.lissom", lissom.load)
