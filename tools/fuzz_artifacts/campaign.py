"""Runs many mutated artifacts through workers, and reduces faults to the fewest mutations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from random import Random

from tools.children import Child
from tools.fuzz_artifacts.mutations import Mutation, choose
from tools.fuzz_artifacts.samples import SAMPLES
from tools.fuzz_artifacts.worker import prepare


@dataclass(frozen=True)
class Case:
    """Mutations of one sample."""

    sample: str
    mutations: tuple[Mutation, ...]

    def __str__(self) -> str:
        return " ".join((self.sample, *map(str, self.mutations)))

    @classmethod
    def of(cls, text: str) -> Case:
        sample, *mutations = text.split()
        return cls(sample, tuple(map(Mutation.of, mutations)))


class Worker:
    """A process that judges cases and shares nothing with this one. It is restarted after a case that ended it."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self.seconds = seconds
        self._child: Child | None = None

    def judge(self, case: Case) -> str:
        """The outcome of a case, as one word."""
        child = self._child = self._child or Child(partial(prepare, self.folder), method="spawn")
        child.give((case.sample, case.mutations))
        while (result := next(child.results(lambda _, seconds: seconds >= self.seconds), None)) is None:
            wait([child.connection], timeout=0.5)
        if not result.late and result.code is None:
            return result.told[0]
        self.close()
        if not child.ready:
            raise RuntimeError(f"the process that judges artifacts does not start; its exit code is {result.code}")
        return f"FAULT no answer in {self.seconds:g} s" if result.late else f"FAULT the process ended with {result.code}"

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.close()
            self._child = None


def make_samples(folder: Path, names: Sequence[str]) -> None:
    """Save the samples into subfolders of a folder."""
    for name in names:
        if not (folder / name).exists():
            SAMPLES[name].save(folder / name)


def cases(folder: Path, names: Sequence[str], seed: int) -> Iterator[Case]:
    """An endless sequence of cases, determined by the seed and the names."""
    files = {name: sorted(path.name for path in (folder / name).iterdir()) for name in names}
    index = 0
    while True:
        rng = Random(f"{seed} {index}")
        name = rng.choice(names)
        yield Case(name, choose(rng, files[name]))
        index += 1


def smallest(case: Case, judge: Callable[[Case], str]) -> Case:
    """The case without the mutations that its fault does not need."""
    for mutation in case.mutations:
        fewer = Case(case.sample, tuple(kept for kept in case.mutations if kept is not mutation))
        if fewer.mutations and judge(fewer).startswith("FAULT"):
            case = fewer
    return case


def run(
    folder: Path,
    names: Sequence[str],
    seed: int,
    *,
    count: int,
    limit_seconds: float = 60,
    tell: Callable[[str], None] = print,
) -> tuple[Counter[str], dict[Case, str]]:
    """Judge this many cases; returns how often each outcome occurred, and the smallest cases of the faults.

    limit_seconds: time limit of one case. tell: called with each fault and the command that reproduces it.
    """
    words, faults = Counter[str](), dict[Case, str]()
    worker = Worker(folder, limit_seconds)
    try:
        for case in islice(cases(folder, names, seed), count):
            word = worker.judge(case)
            words[f"{case.sample}: {word.partition(' ')[0] if word.startswith('FAULT') else word}"] += 1
            if word.startswith("FAULT"):
                reduced = smallest(case, worker.judge)
                faults[reduced] = worker.judge(reduced)
                tell(f"{faults[reduced]}\n  python -m tools.fuzz_artifacts --replay '{reduced}'")
    finally:
        worker.close()
    return words, faults
