"""The worker process of one engine: reads a line of JSON from standard input, and writes one for every shape.

The request has the fields of `Request`. Each output line is a `Measurement` or a `Failure`. If standard input is closed, nobody
waits for the results, and the process ends together with its child processes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from lissom.cli.bench.engines import ENGINES, Build, Task
from lissom.cli.bench.workload import answer, cosine, load_model, read_inputs, read_wanted
from lissom.measure.timing import Timing, time_calls

_LONGEST_REASON = 300
Result = TypeVar("Result")


@dataclass(frozen=True)
class Request:
    """The request to a worker.

    Attributes:
        shapes: the file of inputs of each, by name.
        calibration: files of inputs of one row.
        seconds: timing per shape.
        folder: an empty directory for the engine's files.
    """

    engine: str
    model: str
    shapes: Mapping[str, str]
    calibration: tuple[str, ...]
    threads: int
    seconds: float
    folder: str


@dataclass(frozen=True)
class Measurement:
    """The measurement of one engine at one shape.

    Attributes:
        median_ms: the median of a call.
        low_ms: the lower quartile.
        high_ms: the upper quartile.
        cosine: between its output and PyTorch's in float32.
        compile_seconds: for all shapes, plus for this one.
        first_call_ms: the first call after compiling.
        peak_mb: the peak memory of the process so far, including model, libraries and compiling.
    """

    engine: str
    shape: str
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    cosine: float
    compile_seconds: float
    first_call_ms: float
    peak_mb: float

    @property
    def timing(self) -> Timing:
        return Timing(self.median_ms, self.low_ms, self.high_ms, self.runs)

    @property
    def first_answer_seconds(self) -> float:
        """From the start of compiling, after loading the model, to the first output at this shape."""
        return self.compile_seconds + self.first_call_ms / 1e3


@dataclass(frozen=True)
class Failure:
    """The reason why an engine did not run at a shape, or at all if the shape is None."""

    engine: str
    shape: str | None
    reason: str


Record = Measurement | Failure


def from_json(fields: Mapping[str, Any]) -> Record:
    """The record in a line of JSON."""
    return Failure(**fields) if "reason" in fields else Measurement(**fields)


def measure(request: Request) -> Iterator[Record]:
    """Prepare an engine, and compile, check and time it at each shape; after an error the next shape is measured."""
    torch.set_num_threads(request.threads)
    name = request.engine
    try:
        calibration = [read_inputs(Path(file)) for file in request.calibration]
        task = Task(load_model(request.model), calibration, request.threads, Path(request.folder))
        prepare_seconds, build = _timed(lambda: ENGINES[name].prepare(task))
    except Exception as error:
        yield Failure(name, None, reason_of(error))
        return
    for shape, file in request.shapes.items():
        try:
            yield _at_shape(request, build, prepare_seconds, shape, Path(file))
        except Exception as error:
            yield Failure(name, shape, reason_of(error))


def _at_shape(request: Request, build: Build, prepare_seconds: float, shape: str, file: Path) -> Measurement:
    inputs = read_inputs(file)
    build_seconds, call = _timed(lambda: build(inputs))
    first_seconds, outputs = _timed(call)
    mask = inputs.get("attention_mask")
    similarity = cosine(answer(outputs), read_wanted(file), None if mask is None else mask.numpy())
    del outputs
    timing = time_calls({request.engine: call}, request.seconds)[request.engine]
    return Measurement(
        engine=request.engine,
        shape=shape,
        median_ms=timing.median_ms,
        low_ms=timing.low_ms,
        high_ms=timing.high_ms,
        runs=timing.runs,
        cosine=similarity,
        compile_seconds=prepare_seconds + build_seconds,
        first_call_ms=first_seconds * 1e3,
        peak_mb=peak_bytes() / 1e6,
    )


def _timed(work: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def reason_of(error: Exception) -> str:
    """The first nonempty line of an error, truncated if very long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:_LONGEST_REASON]


def peak_bytes() -> int:
    """The peak memory of this process.

    On Linux it is read from /proc, because `ru_maxrss` includes the parent process before exec.
    """
    status = Path("/proc/self/status")
    if status.is_file() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))):
        return int(match[1]) << 10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _end_with_input() -> None:
    """Wait for the end of standard input, then end this process, and its process group if it leads one."""
    # With os.read: a thread that waits in a text stream holds its lock, and Python could not exit.
    while os.read(0, 1 << 16):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Answer the request; output of libraries goes to standard error."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = Request(**json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_input, daemon=True).start()
    for record in measure(request):
        print(json.dumps(asdict(record)), file=lines, flush=True)


if __name__ == "__main__":
    main()
