"""Tests of lissom.shadowing: files of the current directory that hide packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lissom
from lissom.shadowing import shadowed_install, shadowed_package

PACKAGE = Path(lissom.__file__).parent


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in that folder, with Lissom installed elsewhere."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, env=environment, cwd=folder
    )


def test_file_that_hides_package_is_named_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("print('not torch')\n")
    found = run(tmp_path, "-m", "lissom", "--version")
    assert found.returncode == 1 and found.stdout == ""
    assert found.stderr == (
        "error: 'torch.py' in this directory hides the package torch; rename it, or run from another directory\n"
    )


def test_a_script_is_told_by_an_import_error(tmp_path: Path) -> None:
    (tmp_path / "typer").mkdir()
    (tmp_path / "typer" / "__init__.py").write_text("")
    found = run(tmp_path, "-c", "import lissom")
    assert found.stderr.splitlines()[-1].startswith("ImportError: 'typer' in this directory hides the package typer;")


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python searches first."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def test_other_files_hide_nothing(first: Path) -> None:
    (first / "torches.py").write_text("")
    (first / "torch").mkdir()
    assert shadowed_package(first) is None


def test_a_folder_that_is_searched_later_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("")
    assert shadowed_package(tmp_path) is None


def test_copy_that_runs_instead_of_installed_one_is_named(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = first / "site"
    (installed / "lissom").mkdir(parents=True)
    (installed / "lissom-1.0.dist-info").mkdir()
    (installed / "lissom-1.0.dist-info" / "METADATA").write_text("Name: lissom\nVersion: 1.0\n")
    monkeypatch.setattr(sys, "path", [str(first), str(installed)])
    found = shadowed_install(first, first / "lissom")
    assert found is not None and found.startswith("lissom/ of this directory runs, not the installed ")
    assert shadowed_install(first, installed / "lissom") is None
    monkeypatch.setenv("PYTHONPATH", str(first))
    assert shadowed_install(first, first / "lissom") is None
