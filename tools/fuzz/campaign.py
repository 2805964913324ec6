"""Runs cases in processes of their own, so that a crash or a hang costs one case, and makes failures simpler."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from tools.fuzz import case as cases
from tools.fuzz import models, pipelines
from tools.fuzz.case import Case, Outcome
from tools.zoo.runner import confine

PATIENCE = 240.0
"""Seconds by the clock that one case may take; the slowest takes some ten seconds of a processor."""


@dataclass
class _Worker:
    """A process, the cases it has yet to run, and since when it runs the first of them."""

    process: BaseProcess
    reader: Connection
    left: list[tuple[int, Case]]
    since: float


def warm_up() -> None:
    """Import and build what every process needs. PyTorch is kept on one thread: a pool of threads does not survive a fork."""
    torch.set_num_threads(1)
    cases.run(Case(models.Spec(), ("prune-neurons{keep=0.5}", "quantize")))
    cases.run(Case(models.Spec(), ("cast",), dynamic=False))
    # What an export to ONNX imports, and no session: its threads would not survive a fork.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),), dynamo=True, verbose=False)
    gc.collect()
    gc.freeze()


def run_all(blocks: Iterator[list[tuple[int, Case]]], jobs: int, address: str = "") -> Generator[tuple[int, Case, Outcome]]:
    """The outcomes of cases, as they come. blocks: cases that share a process; jobs: processes at a time."""
    running: list[_Worker] = []
    try:
        while True:
            while len(running) < jobs and (block := next(blocks, None)) is not None:
                running.append(_start(block, address))
            if not running:
                return
            wait([worker.reader for worker in running], timeout=1.0)
            for worker in list(running):
                yield from _read(worker)
                ended = _ended(worker)
                if ended is None:
                    continue
                running.remove(worker)
                if worker.left:
                    (number, case), *rest = worker.left
                    yield number, case, ended
                    if rest:
                        running.append(_start(rest, address))
    finally:
        for worker in running:
            worker.process.kill()


def run_apart(case: Case, address: str = "") -> Outcome:
    """The outcome of one case in a process of its own."""
    return next(run_all(iter([[(0, case)]]), 1, address))[2]


def shrink(case: Case, kind: str, still: Callable[[Case], str] = lambda case: run_apart(case).kind, rounds: int = 60) -> Case:
    """A simpler case that fails in the same way. kind: of its outcome; rounds: the most candidates that are tried."""
    tried = 0
    found = True
    while found:
        found = False
        for candidate in _simpler(case):
            tried += 1
            if tried > rounds:
                return case
            if still(candidate) == kind:
                case, found = candidate, True
                break
    return case


def _simpler(case: Case) -> Iterator[Case]:
    for passes in pipelines.simpler(case.passes):
        yield dataclasses.replace(case, passes=passes)
    for at in range(len(case.calls)):
        yield dataclasses.replace(case, calls=case.calls[:at] + case.calls[at + 1 :])
    if case.saved:
        yield dataclasses.replace(case, saved=False)
    if not case.zoo:
        for spec in models.simpler(case.spec):
            yield dataclasses.replace(case, spec=spec)


def _start(block: Sequence[tuple[int, Case]], address: str) -> _Worker:
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(block, writer, address), daemon=True)
    process.start()
    writer.close()
    return _Worker(process, reader, list(block), time.monotonic())


def _work(block: Sequence[tuple[int, Case]], writer: Connection, address: str) -> None:
    """Run the cases, with nothing on the terminal."""
    confine()
    for _, case in block:
        writer.send(cases.run(case, address))
    writer.close()


def _read(worker: _Worker) -> Generator[tuple[int, Case, Outcome]]:
    """What the process has sent."""
    try:
        while worker.left and worker.reader.poll():
            outcome = worker.reader.recv()
            number, case = worker.left.pop(0)
            worker.since = time.monotonic()
            yield number, case, outcome
    except EOFError:
        return


def _ended(worker: _Worker) -> Outcome | None:
    """What became of the process that has ended or had to be killed; None while it runs."""
    if worker.left and worker.process.is_alive():
        if time.monotonic() - worker.since < PATIENCE:
            return None
        worker.process.kill()
        worker.process.join()
        return Outcome("hang", f"took longer than {PATIENCE:g} s")
    worker.process.join()
    worker.reader.close()
    return Outcome("crash", f"the process ended with code {worker.process.exitcode}")
