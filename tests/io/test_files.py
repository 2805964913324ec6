"""Tests of lissom.io.files and of the paths commands write to: plain files only, whole or not at all."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lissom
from lissom.artifacts.arrays import write_tensors
from lissom.artifacts.directory import verified_bytes, verified_path, write_directory
from lissom.artifacts.manifest import Content
from lissom.cli.main import app
from lissom.errors import ArtifactError
from lissom.io.files import check_writable, open_plain, write_whole, writing_whole
from tests.support.saving import compiled

SPECIAL = "is a device, a pipe or a socket, and would be replaced; name a regular file"


@contextmanager
def as_nobody():
    """Without the rights of root, who may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_special(path: Path, kind: str) -> str:
    """Put something that is not a regular file at a path, and say how it is refused."""
    if kind == "pipe":
        os.mkfifo(path)
        return SPECIAL
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
        return SPECIAL
    if kind == "folder":
        path.mkdir()
        return "cannot be written: it is a directory; name a file in it"
    (path.parent / "real").write_text("kept")
    path.symlink_to(path.parent / "real")
    return "is a symbolic link, and would be replaced; name the file itself"


def kind_of(path: Path) -> int:
    return path.lstat().st_mode


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "link"])
def test_what_is_no_plain_file_is_refused_and_stays(tmp_path, kind, monkeypatch):
    # The names of sockets are short.
    monkeypatch.chdir(tmp_path)
    path = Path("out")
    said = make_special(path, kind)
    was = kind_of(path)
    for write in (
        check_writable,
        lambda path: write_whole(path, "new"),
        lambda path: write_tensors({"a": torch.ones(2)}, path),
    ):
        with pytest.raises(ArtifactError) as caught:
            write(path)
        # Named as the caller does, or in full.
        assert str(caught.value) in (f"'out' {said}", f"'{tmp_path / 'out'}' {said}")
    assert kind_of(path) == was
    assert not [name for name in names_in(tmp_path) if name.startswith(".lissom")]


def test_a_device_is_refused():
    was = kind_of(Path("/dev/null"))
    for option in ("--text", "--history"):
        error = CliRunner().invoke(app, ["compile", "no-such-model", option, "/dev/null"]).exception
        assert str(error) == f"'/dev/null' {SPECIAL}"
    assert kind_of(Path("/dev/null")) == was


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_commands_refuse_before_they_work(tmp_path, kind):
    make_special(tmp_path / "out", kind)
    for command in (
        ["compile", "no-such-model", "--text"],
        ["compile", "no-such-model", "--history"],
        ["compile", "no-such-model", "--save"],
        ["run", "no-such-model", "--input", "x.npz", "--output"],
        ["bench", "no-such-model", "--markdown"],
        ["generate", "no-such-model", "a text", "--save"],
    ):
        error = CliRunner().invoke(app, [*command, str(tmp_path / "out")]).exception
        assert isinstance(error, ArtifactError), (command, error)
        assert str(tmp_path / "out") in str(error)
        assert "no-such-model" not in str(error)


@pytest.mark.parametrize(
    ("name", "said"), [("n" * 300, "File name too long"), ("a\0b", "embedded null byte"), ("no/where", "there is no directory")]
)
def test_names_that_cannot_be_are_one_sentence(tmp_path, name, said):
    for write in (
        check_writable,
        lambda path: write_whole(path, "x"),
        lambda path: write_tensors({}, path),
        lambda path: write_directory(path, lambda folder: None),
        compiled("tied").save,
    ):
        with pytest.raises(ArtifactError, match=f"cannot be (written|looked up): .*{said}"):
            write(tmp_path / name)
    with pytest.raises(ArtifactError):
        lissom.load(tmp_path / name)
    assert names_in(tmp_path) == []


def test_the_longest_name_is_written(tmp_path):
    name = "n" * os.pathconf(tmp_path, "PC_NAME_MAX")
    write_whole(tmp_path / name, "x")
    assert (tmp_path / name).read_text() == "x"
    compiled("tied").save(tmp_path / name[1:])
    assert lissom.load(tmp_path / name[1:]).program.name == "Tied"


def test_a_folder_that_takes_no_files_is_told(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    (folder / "old").write_text("old")
    # So that another user may enter it.
    for path in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(0o755)
    folder.chmod(0o555)
    with as_nobody():
        for name in ("old", "new"):
            for write in (lambda path: write_whole(path, "x"), lambda path: write_directory(path, names_in)):
                # The system's own check is of the user who started the process.
                with pytest.raises(ArtifactError, match=r"Permission denied|takes no new files|exists and is not an artifact"):
                    write(folder / name)
    assert names_in(folder) == ["old"] and (folder / "old").read_text() == "old"


def test_file_that_finds_no_room_leaves_old_one(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for write in (lambda: write_whole(path, "x" * 5000), lambda: write_tensors({"a": torch.ones(5000)}, path)):
            with pytest.raises(ArtifactError) as caught:
                write()
            assert str(caught.value) == (
                f"'{path}' cannot be written: File too large; what was there before is unchanged: "
                f"make room, or choose another directory"
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old" and names_in(tmp_path) == ["out"]


def test_what_takes_the_place_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(ArtifactError, match=SPECIAL), writing_whole(path) as file:
        file.write(b"new")
        os.mkfifo(path)
    assert names_in(tmp_path) == ["out"]
    target = tmp_path / "artifact"
    with pytest.raises(ArtifactError, match="exists and is not an artifact, so it is not replaced"):
        write_directory(target, lambda folder: target.write_text("mine"))
    assert target.read_text() == "mine" and names_in(tmp_path) == ["artifact", "out"]


def test_temporary_names_cannot_be_guessed(tmp_path):
    names = set()
    for _ in range(20):
        with writing_whole(tmp_path / "out"):
            (temporary,) = {*names_in(tmp_path)} - {"out"}
            names.add(temporary)
    # 64 random bits each.
    assert len(names) == 20 and all(len(name) == len(".lissom-") + 16 for name in names)


@pytest.mark.parametrize("manifest", ['{"name": "an extension", "version": 3}', "[]", "no JSON", '{"kind": "lissom artifact"}'])
def test_folder_with_manifest_of_something_else_is_not_replaced(tmp_path, manifest):
    target = tmp_path / "project"
    target.mkdir()
    (target / "manifest.json").write_text(manifest)
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="exists and is not an artifact, so it is not replaced; choose another directory"):
        compiled("tied").save(target)
    assert (target / "thesis.txt").read_text() == "years of work"


def test_files_of_others_in_an_artifact_are_not_deleted(tmp_path):
    target = tmp_path / "artifact"
    compiled("tied").save(target)
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError) as caught:
        compiled("tied").save(target)
    assert str(caught.value) == (
        f"'{target}' holds 'thesis.txt' besides the artifact's own files, so it is not replaced; "
        f"take it out, or choose another directory"
    )
    assert (target / "thesis.txt").read_text() == "years of work"


def test_what_is_read_is_what_was_checked(tmp_path):
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"wanted")
    other.write_bytes(b"forged")
    content = Content.of(path)
    assert verified_bytes(path, content) == b"wanted"
    with verified_path(path, content) as held:
        other.replace(path)
        assert held.read_bytes() == b"wanted"
    for data, said in (
        (b"forged", "its SHA-256 is another"),
        (b"short", "has 5 bytes, and had 6"),
        (b"longer!", "has 7 bytes"),
    ):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=said):
            verified_bytes(path, content)
        with pytest.raises(ArtifactError, match=said), verified_path(path, content):
            pass


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "link"])
def test_only_plain_files_are_opened(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_special(Path("in"), kind)
    what = "a symbolic link" if kind == "link" else "not a regular file"
    with pytest.raises(ArtifactError, match=f"'in' is {what}; an artifact holds regular files only: copy the file itself"):
        open_plain(Path("in"))
