"""Checks many models, each in a process of its own with a time limit, and writes each record as soon as it is there."""

from __future__ import annotations

import importlib
import json
import os
import resource
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tools.children import Tell, run_apart
from tools.zoo import catalogue
from tools.zoo.entry import Entry

MOST_BYTES = 6 << 30
_WARMING = ("causal/llama", "encoder-decoder/bart", "vision/vit")
_PATIENCE = 8
"""How much longer than its processor time a model may take by the clock, on a machine that is busy."""
Record = dict[str, Any]
Check = Callable[[Entry, Callable[[Record], None]], None]
"""Finds out about one model, and calls what it is given with the facts known so far."""


def run(
    entries: Sequence[Entry],
    output: Path,
    check: Check,
    describe: Callable[[Record], str],
    *,
    seconds: float = 60.0,
    jobs: int = 2,
) -> list[Record]:
    """The records of the models, in the order they were finished; each is appended to `output`, one a line,
    so that an interrupted run loses nothing.

    check: what is found out about each model, in a process of its own. describe: one line about a record.
    seconds: the processor time one model may take before its process is killed. jobs: how many run at a time.

    The children are forks of this process, so what it has imported costs them nothing.
    """
    records: list[Record] = []
    _warm({entry.family for entry in entries}, check)
    with output.open("a", encoding="utf-8") as file, _bar(len(entries), describe) as advance:
        for record in _records(iter(entries), seconds, jobs, check):
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            advance(record)
    return records


def _records(entries: Iterator[Entry], seconds: float, jobs: int, check: Check) -> Iterator[Record]:
    def late(process: BaseProcess, waited: float) -> bool:
        return waited >= _PATIENCE * seconds or (waited >= seconds and _processor_seconds(process) >= seconds)

    for result in run_apart(([entry] for entry in entries), partial(_prepare, check), jobs, late):
        record: Record = {"name": result.item.name, "family": result.item.family}
        for told in result.told:
            record |= told
        phase = record.pop("phase", None)
        if result.late:
            record |= {"failed": phase, "error": f"took longer than {seconds:g} s", "total_seconds": seconds}
        elif result.code is not None:
            record |= {"failed": phase or "start", "error": f"the process died with code {result.code}"}
        record.setdefault("total_seconds", round(result.seconds, 2))
        yield record


def _processor_seconds(process: BaseProcess) -> float:
    """The processor time a process has used; endless where the system does not tell, so that the clock decides."""
    try:
        user, system = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:
        return float("inf")
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def confine() -> None:
    """Limit the memory this process may allocate, and let nothing of it reach the terminal."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _prepare(check: Check) -> Callable[[Entry, Tell], None]:
    """What checks one model and tells what is found, with nothing on the terminal."""
    confine()

    def work(entry: Entry, tell: Tell) -> None:
        started = time.process_time()
        check(entry, tell)
        tell({"total_seconds": round(time.process_time() - started, 2)})

    return work


def _warm(families: Collection[str], check: Check) -> None:
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
            check(entry, lambda record: None)


@contextmanager
def _bar(total: int, describe: Callable[[Record], str]) -> Generator[Callable[[Record], None]]:
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
