"""Tests of lissom.io.processes: Python processes that import nothing from the current directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import lissom
from lissom.io import processes
from lissom.io.processes import python_command, python_environment, signal_name


def test_a_process_imports_nothing_from_its_directory(tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    command = python_command("lissom.cli.bench.worker")
    done = subprocess.run(
        command, cwd=tmp_path, env=python_environment(), input="{}", capture_output=True, text=True, check=False
    )
    assert "imported" not in done.stderr and "TypeError" in done.stderr


def test_the_environment_keeps_absolute_folders_in_their_order(monkeypatch):
    package = str(Path(lissom.__file__).parent.parent)
    monkeypatch.setattr(sys, "path", ["", "/first", "relative", "/second"])
    assert python_environment(SETTING="1")["SETTING"] == "1"
    assert python_environment()["PYTHONPATH"].split(os.pathsep) == [package, "/first", "/second"]
    monkeypatch.setattr(sys, "path", ["/first", package])
    assert python_environment()["PYTHONPATH"].split(os.pathsep) == ["/first", package]


def test_the_environment_leaves_out_what_it_cannot_hold(monkeypatch):
    """A colon parts paths, and what is after it would be relative."""
    monkeypatch.setattr(processes, "__file__", "/pack:age/lissom/io/processes.py")
    monkeypatch.setattr(sys, "path", ["/first", "/sec:ond", Path("/third"), "/fourth"])
    found = python_environment()
    assert (found["PYTHONPATH"], found["PYTHONSAFEPATH"]) == ("/first:/fourth", "1")


def test_a_signal_has_a_name():
    assert signal_name(signal.SIGKILL) == "SIGKILL"
    assert signal_name(200) == "200"
