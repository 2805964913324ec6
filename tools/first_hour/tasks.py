"""The steps of the first hour, and the child processes that their tasks run in."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_rows import ROWS, SHAPES, Row
from tools.first_hour.results import Result

ROOT = Path(__file__).resolve().parent.parent.parent
_LOG_CHARACTERS = 4000


@dataclass(frozen=True)
class Task:
    """A command that prints one line of JSON at the end of its output, and the seconds it may take."""

    name: str
    command: Sequence[str]
    seconds: float


@dataclass(frozen=True)
class Step:
    """Tasks that run one after the other.

    Attributes:
        about: its heading in the report.
        seconds: what all tasks together may take; those that have not begun by then wait for the next start.
        tasks: given whether the GPU is pretended.
    """

    name: str
    about: str
    seconds: float
    tasks: Callable[[bool], list[Task]]


def _own(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"tools.first_hour.{module}", *arguments]


def _with_device(pretend: bool) -> list[str]:
    return ["--pretend"] if pretend else []


def _environment(pretend: bool) -> list[Task]:
    return [Task("environment", _own("environment", *_with_device(pretend)), 60)]


def _operators(pretend: bool) -> list[Task]:
    # Compiling kernels of Triton may take a minute; each kind has a process of its own, so that a fault of one ends no other.
    kinds = ("triton", "int8", "fp8", "int4", "attention", "rows", "sparse")
    return [Task(kind, _own("operators", kind, *_with_device(pretend)), 60 if pretend else 90) for kind in kinds]


def gpu_test_files() -> list[str]:
    """The files with tests marked `gpu`."""
    marked = re.compile(r"^(@pytest\.mark\.gpu|pytestmark = pytest\.mark\.gpu)", re.MULTILINE)
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path.relative_to(ROOT).as_posix() for path in paths if marked.search(path.read_text(encoding="utf-8"))]


def _tests(pretend: bool) -> list[Task]:
    files = gpu_test_files()
    # Continuous integration runs all of them on the pretended GPU.
    return [Task(file, _own("gpu_tests", file), 180) for file in (files[:3] if pretend else files)]


def _benchmark(row: Row, pretend: bool) -> Task:
    command = [sys.executable, "benchmarks/gpu.py", "--one", row.model, row.dtype, row.engine, "--seconds", "1"]
    return Task(str(row), [*command, *_with_device(pretend)], 420 if row.engine == "torch.compile" else 150)


def _first_rows(pretend: bool) -> list[Task]:
    rows = [row for row in ROWS if row.model == "bert-base" and row.dtype == "bfloat16"]
    engines = ("eager", "lissom", "lissom-int8")
    return [_benchmark(row, pretend) for row in rows if row.engine in engines]


def _benchmarks(pretend: bool) -> list[Task]:
    first = {task.name for task in _first_rows(pretend)}
    rows = [row for row in ROWS if str(row) not in first]
    if pretend:  # one row of each model; TorchInductor needs Triton
        chosen = {"vit-b16": "lissom-fp8", "bert-large": "lissom", "llama-1b": "lissom-int4"}
        rows = [row for row in rows if row.dtype == "bfloat16" and chosen.get(row.model) == row.engine]
    return [_benchmark(row, pretend) for row in rows]


def _profiles(pretend: bool) -> list[Task]:
    engines = ("lissom",) if pretend else ("lissom", "lissom-int8", "lissom-fp8", "lissom-int4", "torch.compile", "eager")
    models = ("vit-b16",) if pretend else tuple(SHAPES)
    rows = [(engine, model) for engine in engines for model in models]
    command = [sys.executable, "benchmarks/gpu.py", *_with_device(pretend), "--profile"]
    return [Task(f"{model} bfloat16 {engine}", [*command, model, "bfloat16", engine], 180) for engine, model in rows]


def _predictions(pretend: bool) -> list[Task]:
    models = ["bert-base"] if pretend else list(SHAPES)
    return [Task(model, _own("predictions", "--json", model), 120) for model in models]


STEPS = (
    Step("environment", "Environment", 60, _environment),
    Step("operators", "Operators at real sizes", 120, _operators),
    Step("first-rows", "The first rows of the GPU table", 120, _first_rows),
    Step("tests", "Tests marked `gpu`", 420, _tests),
    Step("benchmarks", "The GPU table", 1200, _benchmarks),
    Step("profiles", "The ten longest kernels", 300, _profiles),
    Step("predictions", "Predictions", 180, _predictions),
)
"""In this order: 5 minutes to the first rows of the table, 40 in all."""


def run(step: str, task: Task, seconds: float) -> Result:
    """Run a task in a process group of its own, which is killed at the end, after that many seconds, or on an interruption."""
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            task.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
            start_new_session=True,
        )  # fmt: skip
        late = False
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _kill(child)
        taken = time.monotonic() - started
        output.seek(0)
        errors.seek(0)
        told, log = (file.read().decode(errors="replace") for file in (output, errors))
    log = log[-_LOG_CHARACTERS:]
    if late:
        return Result(step, task.name, "late", taken, error=f"did not end within {seconds:.0f} seconds", log=log)
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        why = ", which the system sends where memory runs out" if name == "SIGKILL" else ""
        return Result(step, task.name, "killed", taken, error=f"ended by {name}{why}", log=log)
    lines = told.strip().splitlines()
    if child.returncode or not lines:
        error = (log.strip().splitlines() or [f"exit code {child.returncode} without a message"])[-1]
        return Result(step, task.name, "failed", taken, error=error, log=log)
    try:
        return Result(step, task.name, "done", taken, data=json.loads(lines[-1]))
    except json.JSONDecodeError:
        return Result(step, task.name, "failed", taken, error=f"printed no JSON but: {lines[-1][:200]}", log=log)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started; those that it left behind hold memory of the GPU too."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
