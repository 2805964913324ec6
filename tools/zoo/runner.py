"""Checks many models, each in a child process with a time limit, and writes each record as soon as it is complete."""

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
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tools.children import Tell, run_apart
from tools.zoo import catalogue

MOST_BYTES = 6 << 30
_WARMING = ("causal/llama", "encoder-decoder/bart", "vision/vit")
_PATIENCE = 8
"""Wall-clock limit of a model as a multiple of its processor time, for a busy machine."""
Record = dict[str, Any]


class Named(Protocol):
    """An item of work: its unique name, and the family it is counted in."""

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str: ...


Item = TypeVar("Item", bound=Named)
Check = Callable[[Item, Callable[[Record], None]], None]
"""Checks one model; it calls its argument with the record after every phase."""


def run(
    entries: Sequence[Item],
    output: Path,
    check: Check[Item],
    describe: Callable[[Record], str],
    *,
    seconds: float = 60.0,
    jobs: int = 2,
    warm: Callable[[], None] | None = None,
    block: int = 1,
) -> list[Record]:
    """The records of the models, in the order they finished; each is appended to `output`, one per line,
    so that an interrupted run loses nothing.

    check: checks one model in a child process. describe: one line about a record.
    seconds: the processor time of one model before its process is killed. jobs: how many run at a time.
    warm: imports what the children need; by default what the zoo needs. block: models that share a process.

    The children are forks of this process, so they need not import its modules again.
    """
    records: list[Record] = []
    # PyTorch uses one thread, because a thread pool does not survive a fork.
    importlib.import_module("torch").set_num_threads(1)
    warm() if warm is not None else warm_zoo({entry.family for entry in entries}, check)
    with output.open("a", encoding="utf-8") as file, _bar(len(entries), describe) as advance:
        for record in _records(entries, seconds, jobs, check, block):
            records.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            advance(record)
    return records


def _records(entries: Sequence[Item], seconds: float, jobs: int, check: Check[Item], block: int) -> Iterator[Record]:
    def late(process: BaseProcess, waited: float) -> bool:
        return waited >= _PATIENCE * seconds or (waited >= seconds and _processor_seconds(process) >= seconds)

    blocks = (entries[start : start + block] for start in range(0, len(entries), block))
    for result in run_apart(blocks, partial(_prepare, check), jobs, late):
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
    """The processor time of a process; infinite if the system does not report it, so that the wall-clock limit applies."""
    try:
        user, system = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    except OSError:
        return float("inf")
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def confine() -> None:
    """Limit the memory this process may allocate, and silence its output to the terminal."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _prepare(check: Check[Item]) -> Callable[[Item, Tell], None]:
    """The function that checks one model and reports the record, without printing to the terminal."""
    confine()

    def work(entry: Item, tell: Tell) -> None:
        started = time.process_time()
        check(entry, tell)
        tell({"total_seconds": round(time.process_time() - started, 2)})

    return work


def warm_zoo(families: Collection[str], check: Check[Any]) -> None:
    """Import what many children need, and check a few models here to fill the caches of the capture."""
    for library in ("timm", "torchvision", "x_transformers"):
        if library.replace("_", "-") in families:
            importlib.import_module(library)
    for entry in catalogue.entries():
        if entry.name in _WARMING:
            check(entry, lambda record: None)


@contextmanager
def _bar(total: int, describe: Callable[[Record], str]) -> Generator[Callable[[Record], None]]:
    """A progress bar on a terminal, one line per model elsewhere."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # The bar has no thread that redraws it: a fork would copy the locks it holds.
    options = {"transient": True, "disable": not console.is_terminal, "auto_refresh": False}
    with Progress(*columns, console=console, **options) as bar:
        task = bar.add_task("", total=total)

        def advance(record: Record) -> None:
            bar.update(task, advance=1, description=record["name"])
            if record.get("failed") or not console.is_terminal:
                console.print(describe(record), highlight=False, markup=False, soft_wrap=True)
            bar.refresh()

        yield advance
