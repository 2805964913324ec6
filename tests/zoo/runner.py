"""Checks many models, each in a process of its own with a time limit, and writes each record as soon as it is there."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tests.zoo import catalogue
from tests.zoo.check import EAGER, check
from tests.zoo.entry import Entry
from tests.zoo.fresh import loader

MOST_BYTES = 6 << 30
_WARMING = ("causal/llama", "encoder-decoder/bart", "vision/vit")
_PATIENCE = 8
"""How much longer than its processor time a model may take by the clock, on a machine that is busy."""
Record = dict[str, Any]


@dataclass(frozen=True)
class _Ask:
    """What is asked of every model: the backends it runs on, and where what was compiled is loaded again."""

    backends: tuple[str, ...]
    loader: str | None


@dataclass
class _Job:
    """A model being checked, and what is known about it so far."""

    entry: Entry
    process: BaseProcess
    reader: Connection
    started: float
    record: Record


def run(
    entries: Sequence[Entry],
    output: Path,
    *,
    seconds: float = 60.0,
    jobs: int = 2,
    backends: Sequence[str] = (EAGER,),
    reload: bool = True,
) -> list[Record]:
    """The records of the models, in the order they were finished; each is appended to `output`, one a line,
    so that an interrupted run loses nothing.

    seconds: the processor time one model may take before its process is killed. jobs: how many run at a time.
    backends: what runs each model. reload: save what was compiled, and load it in a process that never saw the model.

    The children are forks of this process, so what it has imported costs them nothing.
    """
    records: list[Record] = []
    with ExitStack() as stack:
        address = stack.enter_context(loader()) if reload else None
        _warm({entry.family for entry in entries}, backends)
        file = stack.enter_context(output.open("a", encoding="utf-8"))
        advance = stack.enter_context(_bar(len(entries)))
        for record in _records(iter(entries), seconds, jobs, _Ask(tuple(backends), address)):
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            advance(record)
    return records


def _records(entries: Iterator[Entry], seconds: float, jobs: int, ask: _Ask) -> Iterator[Record]:
    running: list[_Job] = []
    try:
        while True:
            while len(running) < jobs and (entry := next(entries, None)) is not None:
                running.append(_start(entry, ask))
            if not running:
                return
            wait([job.reader for job in running], timeout=0.5)
            for job in list(running):
                if _finished(job, seconds):
                    running.remove(job)
                    yield job.record
    finally:
        for job in running:
            job.process.kill()


def _start(entry: Entry, ask: _Ask) -> _Job:
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(entry, writer, ask), daemon=True)
    process.start()
    writer.close()
    return _Job(entry, process, reader, time.perf_counter(), {"name": entry.name, "family": entry.family})


def _finished(job: _Job, seconds: float) -> bool:
    """Read what the child told. True when it is done, has died, or had to be killed."""
    closed = False
    while not closed and job.reader.poll():
        try:
            job.record |= job.reader.recv()
        except EOFError:
            closed = True
    waited = time.perf_counter() - job.started
    if not closed and waited < _PATIENCE * seconds and (waited < seconds or _processor_seconds(job.process) < seconds):
        return False
    phase = job.record.pop("phase", None)
    if not closed:
        job.process.kill()
        job.record |= {"failed": phase, "error": f"took longer than {seconds:g} s"}
        job.record["total_seconds"] = seconds
    job.process.join()
    if closed and phase is not None:
        job.record |= {"failed": phase, "error": f"the process died with code {job.process.exitcode}"}
    job.record.setdefault("total_seconds", round(waited, 2))
    job.reader.close()
    return True


def _processor_seconds(process: BaseProcess) -> float:
    """The processor time a process has used; endless where the system does not tell, so that the clock decides."""
    try:
        user, system = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:
        return float("inf")
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _child(entry: Entry, writer: Connection, ask: _Ask) -> None:
    """Check one model and tell what is found, with nothing on the terminal."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    started = time.process_time()
    check(entry, writer.send, ask.backends, ask.loader)
    writer.send({"total_seconds": round(time.process_time() - started, 2)})
    writer.close()


def _warm(families: Collection[str], backends: Sequence[str]) -> None:
    """Import what many children need, and check a few models here, which fills the caches of what captures them.

    PyTorch is kept on one thread: a pool of threads does not survive a fork.
    """
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    for library in ("timm", "torchvision", "x_transformers"):
        if library.replace("_", "-") in families:
            importlib.import_module(library)
    for entry in catalogue.entries():
        if entry.name in _WARMING:
            check(entry, lambda record: None, backends)


@contextmanager
def _bar(total: int) -> Generator[Callable[[Record], None]]:
    """A progress bar on a terminal, one line a model elsewhere."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # No thread of its own to redraw the bar: a fork would copy the locks it holds.
    options = {"transient": True, "disable": not console.is_terminal, "auto_refresh": False}
    with Progress(*columns, console=console, **options) as bar:
        task = bar.add_task("zoo", total=total)

        def advance(record: Record) -> None:
            bar.update(task, advance=1, description=f"zoo: {record['name']}")
            if record.get("failed") or not console.is_terminal:
                console.print(describe(record), highlight=False, markup=False, soft_wrap=True)
            bar.refresh()

        yield advance


def describe(record: Record) -> str:
    """One line: the model, how long it took, and what came of it."""
    if record.get("failed"):
        outcome = f"{record['failed']}: {record['error']}"
    elif not record["agrees"]:
        outcome = f"the program differs by {record['capture_error']:.2g}"
    else:
        told = ", ".join(f"{name} {_outcome(found)}" for name, found in record["backends"].items())
        outcome = f"{told}, {record['softmax']} softmax left of {record['attention'] + record['softmax']}"
    return f"{record['name']} ({record['total_seconds']:.1f} s): {outcome}"


def _outcome(found: Record) -> str:
    if found.get("failed"):
        return f"{found['failed']}: {found['error']}"
    if not found["equal"]:
        return f"differs by {found['error_found']:.2g}" if found["structure"] else "has another structure"
    if not found.get("reloaded", True):
        return f"differs by {found['reload_error']:.2g} when loaded again"
    return "equal"
