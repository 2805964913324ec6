"""Tests of saves that are stopped: by signals at random moments, and by a disk that is full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lissom
from lissom.artifacts import directory
from lissom.errors import ArtifactError
from tests.support.killing import contents
from tests.support.saving import compiled


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "decoder"])
def test_save_that_is_stopped_leaves_old_or_new(kind):
    command = [sys.executable, "-m", "tests.support.killing", kind, "--signal", "SIGKILL", "--signal", "SIGINT"]
    command += ["--count", "100"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True)
    if made.returncode != 0:
        pytest.skip("no file system may be mounted here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_file_system_leaves_what_was_there(small_disk):
    model = compiled("llama")
    model.save(small_disk / "artifact")
    was = contents(small_disk / "artifact")
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    for kept in (0, 4096, 16_384, 65_536):
        os.truncate(filler, filler.stat().st_size - kept)
        with pytest.raises(ArtifactError) as caught:
            compiled("bert").save(small_disk / "artifact")
        assert str(caught.value) == (
            f"'{small_disk / 'artifact'}' cannot be written: No space left on device; what was there before is unchanged: "
            f"make room, or choose another directory"
        )
        assert contents(small_disk / "artifact") == was
        assert {path.name for path in small_disk.iterdir()} == {"artifact", "filler"}
    filler.unlink()
    compiled("bert").save(small_disk / "artifact")
    # Not loaded: weights that are mapped keep the file system busy.
    assert directory.read_directory(small_disk / "artifact").name == "BertModel"


def left_over(target: Path, word: str) -> Path:
    """What a process that was killed leaves beside a target."""
    path = target.with_name(f"{directory._prefix(target)}0123456789abcdef.{word}")
    path.mkdir()
    (path / "weights.safetensors").write_bytes(b"half")
    return path


def test_what_killed_saves_left_is_deleted_by_the_next(tmp_path):
    target, other = tmp_path / "artifact", tmp_path / "other"
    compiled("tied").save(target)
    left = [left_over(target, "new"), left_over(target, "old")]
    kept = [left_over(other, "new"), tmp_path / ".lissom-mine"]
    kept[1].write_text("not a save's")
    compiled("tied").save(target)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)


def test_what_another_process_writes_just_now_stays(tmp_path):
    target = tmp_path / "artifact"
    compiled("tied").save(target)
    fresh = left_over(target, "new")
    lock = directory._lock(fresh)
    compiled("tied").save(target)
    assert fresh.exists()
    os.close(lock)
    compiled("tied").save(target)
    assert not fresh.exists()


def test_without_artifact_in_its_place_one_set_aside_stays(tmp_path):
    """Where names cannot be exchanged, a process may be killed between two renames."""
    target = tmp_path / "artifact"
    compiled("tied").save(target)
    aside = left_over(target, "old")
    (aside / "weights.safetensors").unlink()
    aside.rmdir()
    target.rename(aside)
    with pytest.raises(ArtifactError, match=r"there is no directory .*; a save that was killed left it as '.*\.old'"):
        lissom.load(target)

    def fail(folder: Path) -> None:
        raise ArtifactError("no")

    with pytest.raises(ArtifactError, match="no"):
        directory.write_directory(target, fail)
    assert (aside / "manifest.json").is_file()
    compiled("tied").save(target)
    compiled("tied").save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_names_are_exchanged_in_one_step_here(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.mkdir()
        (path / path.name).touch()
    if sys.platform != "linux" or not directory._exchange_at_once(one, other):
        pytest.skip("this file system cannot exchange two names")
    assert (one / "other").exists() and (other / "one").exists()
    with pytest.raises(OSError, match="No such file"):
        directory._exchange_at_once(one, tmp_path / "nowhere")
