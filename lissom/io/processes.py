"""Python processes that Lissom starts. They import what this process imports, and nothing from the current directory."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of Lissom. -P keeps the current directory out of `sys.path`."""
    return [sys.executable, "-P", "-m", module, *arguments]


def python_environment(**settings: str) -> dict[str, str]:
    """The environment of such a process: this one's with other settings, and with `sys.path` as `PYTHONPATH`.

    Relative entries of `sys.path` are left out, because the current directory may have changed, and so are those that
    `PYTHONPATH` cannot hold.
    """
    folders = [folder for folder in sys.path if _is_whole(folder)]
    package = str(Path(__file__).resolve().parents[2])
    if package not in folders and _is_whole(package):
        folders.insert(0, package)
    return {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}


def _is_whole(folder: object) -> bool:
    """True for an absolute path as text, without the character that parts paths."""
    return isinstance(folder, str) and Path(folder).is_absolute() and os.pathsep not in folder


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; the number as text for a signal without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
