"""Comparison of engines, each in its own process, so that none affects another's timings or ends the comparison."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from lissom.cli.bench.engines import Engine
from lissom.cli.bench.worker import Failure, Measurement, Record, Request, from_json
from lissom.cli.bench.workload import Shape, Workload, load_model, prepare
from lissom.inspect.progress import Report
from lissom.io.processes import python_command, python_environment, signal_name

LIMIT_SECONDS = 900.0
"""The time limit of an engine for everything except timing."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def compare(
    model: str,
    engines: Sequence[Engine],
    *,
    shapes: Sequence[Shape] | None = None,
    texts: Sequence[str] | None = None,
    threads: int,
    seconds: float,
    progress: Report,
    limit_seconds: float = LIMIT_SECONDS,
) -> Iterator[Record]:
    """Measure every engine at every shape, and yield each record as soon as it is measured.

    Args:
        model: as in `lissom.cli.bench.workload`.
        shapes: as in `lissom.cli.bench.workload`.
        texts: as in `lissom.cli.bench.workload`.
        threads: for each engine.
        seconds: timing per shape.
        progress: called with the current engine, the number of records so far, and the total.

    Raises:
        LissomError: if the model cannot be loaded, or does not run at a shape.
    """
    with tempfile.TemporaryDirectory(prefix="lissom-bench-") as folder:
        progress(f"reading {model}", 0, 1)
        workload = prepare(load_model(model), shapes, texts, Path(folder))
        names = list(workload.shapes)
        for index, engine in enumerate(engines):
            done = index * len(names)
            progress(engine.title, done, len(engines) * len(names))
            if engine.missing:
                yield Failure(engine.name, None, engine.missing)
                continue
            for record in run_worker(engine, workload, threads, seconds, limit_seconds):
                done += 1
                progress(engine.title, done, len(engines) * len(names))
                yield record


def run_worker(
    engine: Engine, workload: Workload, threads: int, seconds: float, limit_seconds: float = LIMIT_SECONDS
) -> Iterator[Record]:
    """The records of one engine; a crash or a timeout is recorded as a failure."""
    limit = limit_seconds + 2 * seconds * len(workload.shapes)
    with (
        tempfile.TemporaryDirectory(prefix="lissom-bench-") as folder,
        tempfile.TemporaryFile("w+", errors="replace") as errors,
    ):
        request = Request(
            engine=engine.name,
            model=workload.model,
            shapes={name: str(path) for name, path in workload.shapes.items()},
            calibration=tuple(map(str, workload.calibration)),
            threads=threads,
            seconds=seconds,
            folder=folder,
        )
        process = _start(threads, errors)
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            _kill(process)

        timer = threading.Timer(limit, expire)
        timer.start()
        try:
            left = list(workload.shapes)
            for record in _exchange(process, request):
                left = left[1:] if record.shape else []
                yield record
            status = process.wait()
            if left:
                reason = f"took longer than {limit:.0f} s" if expired.is_set() else _epitaph(status, errors)
                yield Failure(engine.name, left[0] if len(left) < len(workload.shapes) else None, reason)
        finally:
            timer.cancel()
            _kill(process)
            process.wait()


def _start(threads: int, errors: IO[str]) -> subprocess.Popen[str]:
    settings = dict.fromkeys(_THREADS, str(threads)) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        python_command("lissom.cli.bench.worker"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=python_environment(**settings),
        # Its own process group, which an interrupt on the terminal does not reach and which can be killed as a whole.
        start_new_session=True,
    )


def _exchange(process: subprocess.Popen[str], request: Request) -> Iterator[Record]:
    assert process.stdin is not None and process.stdout is not None
    # The worker ends when its standard input is closed, so it never outlives this process.
    with process.stdout as lines, _open_until_read(process.stdin) as stdin:
        # If the process ended before reading the request, its standard error has the reason.
        with suppress(BrokenPipeError):
            stdin.write(json.dumps(asdict(request)) + "\n")
            stdin.flush()
        for line in lines:
            yield from_json(json.loads(line))


@contextmanager
def _open_until_read(stdin: IO[str]) -> Generator[IO[str]]:
    """Close a worker's standard input when the block ends, even if the worker no longer reads it."""
    try:
        yield stdin
    finally:
        with suppress(BrokenPipeError):
            stdin.close()


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _epitaph(status: int, errors: IO[str]) -> str:
    """The exit status of a process, and the last line of its standard error."""
    errors.seek(0)
    last = next((line.strip() for line in reversed(errors.readlines()) if line.strip()), "")
    ended = f"signal {signal_name(-status)}" if status < 0 else f"exit status {status}"
    return f"its process ended with {ended}{': ' if last else ''}{last[:300]}"


def measurements(records: Sequence[Record], engine: str) -> dict[str, Measurement]:
    """The measurements of one engine, by shape."""
    return {record.shape: record for record in records if isinstance(record, Measurement) and record.engine == engine}
