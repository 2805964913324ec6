"""Tests of lissom.generation.kept: processes that use and remove kept decoders at once take turns."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lissom.artifacts.directory import NAME
from lissom.generation import kept
from lissom.generation.directory import GENERATION
from lissom.ops.native.build import locked

REMOVE = """
import sys
from pathlib import Path
from lissom.generation import kept
print("ready", flush=True)
sys.stdin.readline()
kept.forget_oldest(Path(sys.argv[1]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Six folders that pass for kept decoders, `0` the oldest, of which two are to be kept."""
    monkeypatch.setenv(kept.SWITCH, "2")
    found = tmp_path / "decoders"
    for index in range(6):
        place = found / str(index)
        place.mkdir(parents=True)
        for name in (NAME, GENERATION):
            (place / name).touch()
        os.utime(place, (index, index))
    return found


def ready_to_remove(folder: Path) -> subprocess.Popen[str]:
    """A process that removes the oldest decoders at the next line it reads."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    found = subprocess.Popen([sys.executable, "-c", REMOVE, str(folder)], text=True, **pipes)
    assert found.stdout is not None and found.stdout.readline() == "ready\n"
    return found


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_processes_that_remove_at_once_leave_last_ones_used(folder):
    processes = [ready_to_remove(folder) for _ in range(3)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("now\n")
        process.stdin.flush()
    assert [process.communicate()[1] for process in processes] == [""] * 3
    assert [process.returncode for process in processes] == [0] * 3
    assert names(folder) == {"4", "5"}


def test_a_decoder_used_meanwhile_is_not_removed(folder):
    process = ready_to_remove(folder)
    with locked(folder.with_suffix(".lock")):
        assert process.stdin is not None
        process.stdin.write("now\n")
        process.stdin.flush()
        time.sleep(0.3)
        assert len(names(folder)) == 6
        os.utime(folder / "0")
    assert process.communicate()[1] == ""
    assert names(folder) == {"0", "5"}


def test_decoder_that_is_used_is_last_one_removed(folder):
    assert kept.use(folder / "1")
    assert not kept.use(folder / "none")
    kept.forget_oldest(folder)
    assert names(folder) == {"1", "5"}


def test_unfinished_saves_are_not_counted_and_leftovers_go(folder):
    (folder / "5").rename(folder / ".5.new")
    os.utime(folder / ".5.new")
    (folder / "4").rename(folder / ".4-removed-0")
    kept.forget_oldest(folder)
    assert names(folder) == {".5.new", "2", "3"}
