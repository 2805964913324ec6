"""Results of finished tasks: one JSON file each, which appears complete or not at all."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_CARD = "card.json"


class UsageError(Exception):
    """What the user gave cannot be used. The text is one sentence that says what to do."""


@dataclass(frozen=True)
class Result:
    """A task that ended.

    Attributes:
        step: its step.
        task: its name within the step.
        status: `done`, `failed`, `late` for one that was ended at its limit, or `killed` for one that a signal ended.
        seconds: how long it ran.
        data: what it printed, if it is done.
        error: the last line of its error output, else.
        log: the end of its error output.
    """

    step: str
    task: str
    status: str
    seconds: float
    data: Any = None
    error: str = ""
    log: str = ""


class Results:
    """The results in a directory, all of one card.

    Raises:
        UsageError: for a directory that is a file, or holds results of another card.
    """

    def __init__(self, folder: Path, card: str) -> None:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--out {folder} is a file; name a directory, which is made if it is not there")
        self.folder = folder
        (folder / "results").mkdir(parents=True, exist_ok=True)
        path = folder / _CARD
        known = json.loads(path.read_text(encoding="utf-8"))["card"] if path.exists() else card
        if known != card:
            raise UsageError(f"{folder} holds results of '{known}', and this machine has '{card}'; name another directory")
        write(path, json.dumps({"card": card}))

    def add(self, result: Result) -> None:
        """Keep the result, in place of an earlier one."""
        write(self._path(result.step, result.task), json.dumps(asdict(result), indent=1))

    def find(self, step: str, task: str) -> Result | None:
        """The result of a task; None if it has not ended yet."""
        path = self._path(step, task)
        return Result(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def of(self, step: str) -> list[Result]:
        """The results of a step, by name."""
        paths = sorted((self.folder / "results").glob(f"{step}--*.json"))
        return [Result(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]

    def forget(self, step: str) -> None:
        """Delete the results of a step."""
        for path in (self.folder / "results").glob(f"{step}--*.json"):
            path.unlink()

    def _path(self, step: str, task: str) -> Path:
        return self.folder / "results" / f"{step}--{re.sub(r'[^A-Za-z0-9_.-]+', '-', task)}.json"


def write(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that it is never seen half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
