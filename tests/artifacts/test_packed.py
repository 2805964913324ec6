"""Tests of lissom.artifacts.packed: artifacts in one file, and as links into a cache."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lissom
from lissom.artifacts import packed
from lissom.artifacts.manifest import Content
from lissom.artifacts.packed import copy_linked, load_linked, load_packed, pack
from lissom.errors import ArtifactError, InputError
from tests.support.saving import compiled

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
        (replace(WEIGHTS, "nowhere"), "there is no file '.*weights.safetensors'; copy the artifact whole, or save again"),
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


def test_copy_that_does_not_fit_on_disk_is_refused(linked, tmp_path, monkeypatch):
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


def listing(content: bytes) -> bytes:
    """An archive with a list of files of 8 MiB."""
    end, size = content.rfind(b"PK\x05\x06"), 8 << 20
    return content[:end] + bytes(size) + patched(b"PK\x05\x06", 12, struct.pack("<II", size, end))(content[end:])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (not_utf8, "'utf-8' codec can't decode"),
        (lambda content: content[: len(content) // 2], "File is not a zip file"),
        (patched(b"PK\x01\x02", 42, b"\xff\xff\xff\x7f"), "holds no program of Lissom: "),
        (patched(b"PK\x05\x06", 16, b"\xff\xff\xff\x7f"), "holds no program of Lissom: "),
        (patched(b"PK\x01\x02", 20, b"\x04\0\0\0\x04\0\0\0"), "holds no program of Lissom: "),
        (patched(b"PK\x01\x02", 24, b"\xff\xff\xff\x7f"), "its sizes or names are wrong"),
        (listing, "holds no program of Lissom: its list of files is too long; export the model again"),
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


def test_packed_model_too_large_for_disk_is_refused(tmp_path, monkeypatch):
    pack(compiled("feed_forward").save, tmp_path / "model.lissom")
    assert load_packed(tmp_path / "model.lissom", lissom.load).program.name == "FeedForward"
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ArtifactError, match=r"model\.lissom' takes \d+ bytes, and 100 are free in "):
        load_packed(tmp_path / "model.lissom", lissom.load)


def test_the_number_of_packed_files_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_MOST_FILES", 2)
    path = archive(tmp_path / "model.lissom", "a", "b", "c")
    with pytest.raises(ArtifactError, match="holds no program of Lissom: it holds 3 files, and 2 are the most; export"):
        load_packed(path, lissom.load)


def test_a_list_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise MemoryError

    path = archive(tmp_path / "model.lissom", "a")
    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(ArtifactError, match="holds no program of Lissom: MemoryError; export the model again"):
        load_packed(path, lissom.load)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), InputError("no such key"), MemoryError()], ids=repr)
def test_errors_of_loading_are_passed_on(tmp_path, error):
    def refuse(_: Path) -> Path:
        raise error

    with pytest.raises(type(error)) as caught:
        load_packed(archive(tmp_path / "model.lissom", "a"), refuse)
    assert caught.value is error


@pytest.mark.parametrize("load", [load_packed, load_linked])
def test_errors_of_loading_name_what_was_given(linked, tmp_path, load):
    def refuse(folder: Path) -> Path:
        raise ArtifactError(f"'{folder / WEIGHTS}' is damaged")

    path = linked if load is load_linked else archive(tmp_path / "model.lissom", "a")
    with pytest.raises(ArtifactError, match=f"^'{path / WEIGHTS}' is damaged$"):
        load(path, refuse)


@pytest.mark.parametrize("load", [load_packed, load_linked])
def test_without_a_temporary_directory_nothing_is_copied(linked, tmp_path, monkeypatch, load):
    path = linked if load is load_linked else archive(tmp_path / "model.lissom", "a")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    said = "there is no room for a copy of the model: No such file or directory; set TMPDIR to a directory with room"
    with pytest.raises(ArtifactError, match=said):
        load(path, lissom.load)


def test_a_disk_that_is_full_is_told(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", refuse)
    said = f"cannot be copied to a folder in '{tempfile.gettempdir()}': No space left on device; make room there$"
    path = tmp_path / "model.lissom"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", "{}")
    with pytest.raises(ArtifactError, match=said):
        load_packed(path, lissom.load)


def test_a_missing_file_is_told(tmp_path):
    path = tmp_path / "model.lissom"
    with pytest.raises(ArtifactError, match=f"^there is no file '{path}'; copy the artifact whole, or save again$"):
        load_packed(path, lissom.load)


def test_the_same_files_are_packed_into_the_same_bytes(original, tmp_path):
    """Whenever they were written; a zip archive has no dates before 1980."""
    for seconds in (0, 1_000_000_000):

        def save(folder: Path, seconds: int = seconds) -> None:
            shutil.copytree(original, folder)
            for path in folder.iterdir():
                os.utime(path, (seconds, seconds))

        pack(save, tmp_path / str(seconds))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1000000000").read_bytes()


def test_a_file_changed_after_its_check_is_not_read(tmp_path, monkeypatch):
    path, verify = tmp_path / "model.lissom", packed.verify
    pack(compiled("feed_forward").save, path)

    def then_change(*arguments: object) -> None:
        verify(*arguments)  # pyright: ignore[reportArgumentType]
        path.write_bytes(b"forged")

    monkeypatch.setattr(packed, "verify", then_change)
    assert load_packed(path, lissom.load, Content.of(path)).program.name == "FeedForward"
    assert path.read_bytes() == b"forged"


@pytest.mark.parametrize(("forged", "said"), [(b"forge", "has 5 bytes, and had 6"), (b"forged", "its SHA-256 is another")])
def test_a_file_that_is_not_as_wanted_is_refused(tmp_path, forged, said):
    path = tmp_path / "model.lissom"
    path.write_bytes(forged)
    with pytest.raises(ArtifactError, match=f"^'{path}' .*{said}"):
        load_packed(path, lissom.load, Content.of_bytes(b"wanted"))
