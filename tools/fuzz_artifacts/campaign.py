"""Runs many changed artifacts through workers, and finds the fewest changes that still show a fault."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from tools.fuzz_artifacts.mutations import Mutation, choose
from tools.fuzz_artifacts.samples import SAMPLES

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """Changes of one of the samples."""

    sample: str
    mutations: tuple[Mutation, ...]

    def __str__(self) -> str:
        return " ".join((self.sample, *map(str, self.mutations)))

    @classmethod
    def of(cls, text: str) -> Case:
        sample, *mutations = text.split()
        return cls(sample, tuple(map(Mutation.of, mutations)))


class Worker:
    """A process that judges cases. It is started again after one that ended it."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self.seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    def judge(self, case: Case) -> str:
        """The word for what came of a case."""
        process = self._started()
        assert process.stdin is not None
        process.stdin.write(json.dumps([case.sample, *map(str, case.mutations)]) + "\n")
        process.stdin.flush()
        answer = self._line(process, self.seconds)
        if answer:
            return json.loads(answer)
        late = process.poll() is None
        self.close()
        return f"FAULT no answer in {self.seconds:g} s" if late else f"FAULT the process ended with {process.returncode}"

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            command = [sys.executable, "-m", "tools.fuzz_artifacts.worker", str(self.folder)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
            )
            if self._line(self._process, 600) != "ready\n":
                raise RuntimeError("the worker does not start; run `python -m tools.fuzz_artifacts.worker FOLDER` alone")
        return self._process

    def _line(self, process: subprocess.Popen[str], seconds: float) -> str:
        """What it says next; nothing where it ended, or says nothing in time."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        found = process.stdout.readline() if ready else ""
        if ready and not found:
            process.wait()
        return found

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def make_samples(folder: Path, names: Sequence[str]) -> None:
    """Save the samples into folders of a folder."""
    for name in names:
        if not (folder / name).exists():
            SAMPLES[name].save(folder / name)


def cases(folder: Path, names: Sequence[str], seed: int) -> Iterator[Case]:
    """Cases without end: the same for the same seed and names."""
    files = {name: sorted(path.name for path in (folder / name).iterdir()) for name in names}
    index = 0
    while True:
        rng = Random(f"{seed} {index}")
        name = rng.choice(names)
        yield Case(name, choose(rng, files[name]))
        index += 1


def smallest(case: Case, judge: Callable[[Case], str]) -> Case:
    """The case without the changes that its fault does not need."""
    for mutation in case.mutations:
        fewer = Case(case.sample, tuple(item for item in case.mutations if item is not mutation))
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
    """Judge so many cases; how often each word came up, and the smallest cases of the faults.

    limit_seconds: one case may take. tell: called with each fault and the command that shows it again.
    """
    words, faults = Counter[str](), dict[Case, str]()
    worker = Worker(folder, limit_seconds)
    try:
        for case in islice(cases(folder, names, seed), count):
            word = worker.judge(case)
            words[f"{case.sample}: {word.partition(' ')[0] if word.startswith('FAULT') else word}"] += 1
            if word.startswith("FAULT"):
                found = smallest(case, worker.judge)
                faults[found] = worker.judge(found)
                tell(f"{faults[found]}\n  python -m tools.fuzz_artifacts --replay '{found}'")
    finally:
        worker.close()
    return words, faults
