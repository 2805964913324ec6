"""Loads mutated artifacts, one after the other, and reports the outcome of each; it runs in a process of its own."""

from __future__ import annotations

import builtins
import contextlib
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

from lissom.errors import LissomError
from tools.children import Tell
from tools.fuzz_artifacts.mutations import CANARY, Mutation, apply
from tools.fuzz_artifacts.samples import SAMPLES, Answer, Sample

MOST_BYTES = 4 << 30
"""Bytes a worker may allocate."""
MOST_LOADING = 512 << 20
"""Bytes loading may take; all samples are smaller than a megabyte."""
_PROGRAM = "<lissom program>"
_EVENTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "socket.bind",
    "os.remove",
)
_EVENTS += ("os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "shutil.rmtree", "ctypes.dlopen")


@dataclass
class Watch:
    """Records forbidden events in the process while an artifact is loaded and called."""

    on: bool = False
    seen: list[str] = field(default_factory=list)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook of Python's."""
        # Without a name, the process itself is looked into.
        if not self.on or (event == "ctypes.dlopen" and arguments[0] is None):
            return
        if event in _EVENTS:
            self.seen.append(f"{event} {str(arguments)[:200]}")
        elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            self.seen.append(f"opens {arguments[0]} to write")
        elif event == "compile" and CANARY in str(arguments[0]):
            self.seen.append("compiles text of a file")

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[str]]:
        """The recorded events are in the list afterwards."""
        self.seen, before = [], _settings()
        self.on = True
        try:
            yield self.seen
        finally:
            self.on = False
            self.seen += [f"{name} is another" for name, value in _settings().items() if value != before[name]]


def _settings() -> dict[str, Any]:
    """Global state that a program must not change."""
    return {
        "PyTorch's random state": torch.get_rng_state().numpy().tobytes(),
        "Python's random state": random.getstate(),
        "numpy's random state": numpy.random.get_state()[1].tobytes(),
        "the grad mode": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
        "the folder": str(Path.cwd()),
        "the environment": dict(os.environ),
        "a method of modules": (torch.fx.GraphModule.forward, torch.nn.Module.__call__, torch.nn.Module.forward),
    }


def _same(wanted: Answer, actual: Answer) -> bool:
    def equal(left: object, right: object) -> bool:
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
            return (
                left.dtype == right.dtype and left.shape == right.shape and torch.equal(left.nan_to_num(), right.nan_to_num())
            )
        return type(left) is type(right) and left == right

    return len(wanted) == len(actual) and all(map(equal, wanted, actual))


def _fault(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:300]}"


def _peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def _load(sample: Sample, folder: Path) -> tuple[str, Callable[[], Answer] | None]:
    """The outcome of loading, as one word, and the loaded callable."""
    before = _peak()
    try:
        run = sample.load(folder)
    except LissomError as error:
        return ("refused" if "\n" not in str(error) else f"FAULT a refusal of several lines: {error}"), None
    except Exception as error:
        return f"FAULT loading raises {_fault(error)}", None
    grown = _peak() - before
    return ("loaded" if grown < MOST_LOADING else f"FAULT loading takes {grown >> 20} MiB"), run


def _call(run: Callable[[], Answer], wanted: Answer) -> str:
    """The outcome of the call, as one word."""
    try:
        actual = run()
    except LissomError as error:
        return "refused when called" if "\n" not in str(error) else f"FAULT a refusal of several lines: {error}"
    except Exception as error:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        # Generation in transformers uses the outputs of a mutated program, which may have any shape.
        if _PROGRAM in frames or "/transformers/" in frames[-1]:
            return "raises when called"
        return f"FAULT a call raises {_fault(error)}"
    return "equal" if _same(wanted, actual) else "other"


def judge(sample: Sample, folder: Path, wanted: Answer, watch: Watch) -> str:
    """The outcome of a mutated artifact, as one word."""
    # Resets the peak memory.
    Path("/proc/self/clear_refs").write_text("5")
    with warnings.catch_warnings(), watch.watching() as seen:
        warnings.simplefilter("ignore")
        word, run = _load(sample, folder)
        if word == "loaded" and run is not None:
            word = _call(run, wanted)
    return f"FAULT {seen[0]} ({word})" if seen and not word.startswith("FAULT") else word


def prepare(root: Path) -> Callable[[tuple[str, Sequence[Mutation]], Tell], None]:
    """The function that judges mutations of a sample in a process of its own. root: the folder of the samples."""
    printed = os.memfd_create("printed")
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # It names the keys of a configuration that it does not know.
    watch = Watch()
    setattr(builtins, CANARY, lambda: watch.seen.append("runs code of a file"))
    sys.addaudithook(watch.hear)
    wanted = {name: SAMPLES[name].load(root / name)() for name in SAMPLES if (root / name).is_dir()}
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def work(case: tuple[str, Sequence[Mutation]], tell: Tell) -> None:
        name, mutations = case
        os.ftruncate(printed, 0)
        with tempfile.TemporaryDirectory(prefix="lissom-fuzz-") as place:
            folder = Path(shutil.copytree(root / name, Path(place) / name))
            apply(folder, mutations)
            word = judge(SAMPLES[name], folder, wanted[name], watch)
        sys.stdout.flush()
        if os.fstat(printed).st_size and not word.startswith("FAULT"):
            word = f"FAULT something is printed ({word})"
        tell(word)

    return work
