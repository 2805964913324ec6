"""Runs cases in child processes, so that a crash or a hang costs one case only, and shrinks failures."""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Callable, Generator, Iterator
from functools import partial

import torch

from tools import children
from tools.children import Tell
from tools.fuzz import case as cases
from tools.fuzz import models, pipelines
from tools.fuzz.case import Case, Outcome
from tools.zoo.runner import confine

PATIENCE = 240.0
"""Wall-clock seconds one case may take; the slowest takes about ten seconds of processor time."""


def warm_up() -> None:
    """Import and build what every process needs. PyTorch uses one thread, because a thread pool does not survive a fork."""
    torch.set_num_threads(1)
    cases.run(Case(models.Spec(), ("prune-neurons{keep=0.5}", "quantize")))
    cases.run(Case(models.Spec(), ("cast",), dynamic=False))
    # Import the modules of an ONNX export, but create no session: its threads would not survive a fork.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),), dynamo=True, verbose=False)
    gc.collect()
    gc.freeze()


def run_all(blocks: Iterator[list[tuple[int, Case]]], jobs: int, address: str = "") -> Generator[tuple[int, Case, Outcome]]:
    """Yield the outcomes of cases as they finish. blocks: cases that share a process; jobs: parallel processes."""
    for result in children.run_apart(blocks, partial(_prepare, address), jobs, lambda _, seconds: seconds >= PATIENCE):
        if result.late:
            outcome = Outcome("hang", f"took longer than {PATIENCE:g} s")
        elif result.code is not None:
            outcome = Outcome("crash", f"the process ended with code {result.code}")
        else:
            (outcome,) = result.told
        yield *result.item, outcome


def run_apart(case: Case, address: str = "") -> Outcome:
    """The outcome of one case in a process of its own."""
    return next(run_all(iter([[(0, case)]]), 1, address))[2]


def shrink(case: Case, kind: str, still: Callable[[Case], str] = lambda case: run_apart(case).kind, rounds: int = 60) -> Case:
    """A simpler case with the same kind of failure. kind: the kind of outcome; rounds: the most candidates to try."""
    tried = 0
    shrunk = True
    while shrunk:
        shrunk = False
        for candidate in _simpler(case):
            tried += 1
            if tried > rounds:
                return case
            if still(candidate) == kind:
                case, shrunk = candidate, True
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


def _prepare(address: str) -> Callable[[tuple[int, Case], Tell], None]:
    """The function that runs a case without printing to the terminal."""
    confine()
    return lambda numbered, tell: tell(cases.run(numbered[1], address))
