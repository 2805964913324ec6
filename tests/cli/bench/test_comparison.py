"""Tests of lissom.cli.bench.comparison and of the workers it starts: real processes, and what becomes of those that fail."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lissom.cli.bench.comparison import compare, measurements, run_worker
from lissom.cli.bench.engines import ENGINES, Engine, eager, find_engines
from lissom.cli.bench.worker import Failure, Measurement, Request, measure, peak_bytes, reason_of
from lissom.cli.bench.workload import load_model, parse_shapes, prepare
from tests.frontends.models.test_huggingface import directory  # noqa: F401

LINE = (
    '{"engine": "eager", "shape": "1x4", "median_ms": 2.0, "low_ms": 1.0, "high_ms": 3.0, "runs": 5, "cosine": 1.0, '
    '"compile_seconds": 0.5, "first_call_ms": 250.0, "peak_mb": 9.0}'
)


@pytest.fixture(scope="module")
def workload(directory, tmp_path_factory):  # noqa: F811
    return prepare(load_model(str(directory)), parse_shapes("1x4,2x6"), None, tmp_path_factory.mktemp("workload"))


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Has a shell script run in place of the worker."""

    def use(script: str) -> None:
        file = tmp_path / "python"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(file))

    return use


def run(workload, **options):
    return list(run_worker(ENGINES["eager"], workload, 1, 0.01, **options))


def test_engines_are_measured_at_every_shape_in_own_processes(directory):  # noqa: F811
    shown = []
    engines = (*find_engines("eager"), Engine("absent", "Absent", ("no_such_package",), eager))
    found = list(
        compare(
            str(directory),
            engines,
            shapes=parse_shapes("1x4,2xragged"),
            threads=1,
            seconds=0.01,
            progress=lambda *now: shown.append(now),
        )
    )
    *ran, absent = found
    assert [(item.engine, item.shape) for item in ran] == [("eager", "1x4"), ("eager", "2xragged")]
    for item in ran:
        assert isinstance(item, Measurement)
        assert 0 < item.low_ms <= item.median_ms <= item.high_ms
        assert item.runs >= 5
        assert item.cosine == pytest.approx(1.0)
        assert item.peak_mb > 50
        assert item.first_answer_seconds >= item.first_call_ms / 1e3 > 0
    assert absent == Failure("absent", None, "needs no_such_package: pip install 'lissom[bench]'")
    assert shown[1] == ("PyTorch eager fp32", 0, 4)
    assert shown[-1] == ("Absent", 2, 4)


def test_a_worker_records_what_fails_and_goes_on(workload, directory, tmp_path):  # noqa: F811
    shapes = {"bad": str(tmp_path / "none.npz"), "1x4": str(workload.shapes["1x4"])}
    threads = torch.get_num_threads()
    request = Request("lissom", str(directory), shapes, (), threads, 0.0, str(tmp_path))
    bad, good = measure(request)
    assert isinstance(bad, Failure)
    assert bad.shape == "bad"
    assert "none.npz" in bad.reason
    assert isinstance(good, Measurement)
    assert good.cosine == pytest.approx(1.0)


def test_an_engine_that_cannot_be_prepared_is_one_record(tmp_path):
    (failure,) = measure(Request("eager", "minlm", {"1x4": "none.npz"}, (), torch.get_num_threads(), 0.0, str(tmp_path)))
    assert isinstance(failure, Failure)
    assert failure.shape is None
    assert "did you mean 'minilm'?" in failure.reason


def test_a_crash_keeps_what_was_measured(workload, stand_in):
    stand_in(f"echo '{LINE}'\necho broken beyond repair >&2\nkill -SEGV $$")
    first, second = run(workload)
    assert isinstance(first, Measurement)
    assert second == Failure("eager", "2x6", "its process ended with signal SIGSEGV: broken beyond repair")
    assert measurements([first, second], "eager") == {"1x4": first}


def test_a_process_that_answers_nothing_is_quoted(workload, stand_in):
    stand_in("echo no module >&2\nexit 3")
    assert run(workload) == [Failure("eager", None, "its process ended with exit status 3: no module")]


def test_slow_process_is_ended_with_its_children(workload, stand_in, tmp_path):
    stand_in(f"sleep 60 &\necho $! > {tmp_path}/child\nwait")
    started = time.perf_counter()
    assert run(workload, limit_seconds=0.5) == [Failure("eager", None, "took longer than 1 s")]
    assert time.perf_counter() - started < 20
    child = int((tmp_path / "child").read_text())
    # The orphan is dead at once, and gone as soon as the system has collected it.
    while _is_running(child):
        assert time.perf_counter() - started < 30
        time.sleep(0.02)


def _is_running(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and ") Z " not in status.read_text()


def test_an_interrupt_ends_the_process(workload, stand_in, tmp_path):
    stand_in(f"echo $$ > {tmp_path}/itself\necho '{LINE}'\nsleep 60")
    records = run_worker(ENGINES["eager"], workload, 1, 0.01)
    next(records)
    process = int((tmp_path / "itself").read_text())
    with pytest.raises(KeyboardInterrupt):
        records.throw(KeyboardInterrupt())
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_reason_is_the_first_line_that_says_something():
    assert reason_of(RuntimeError("\n  it broke \nhere")) == "it broke"
    assert reason_of(KeyError()) == "KeyError"
    assert len(reason_of(RuntimeError("x" * 1000))) == 300


@pytest.mark.slow
def test_peak_memory_is_of_this_process_and_never_falls():
    before = peak_bytes()
    assert before > 50 << 20
    # Larger than anything the tests before this one held.
    block = bytearray(before)
    assert peak_bytes() >= before + (before >> 2)
    del block
    assert peak_bytes() >= before + (before >> 2)


@pytest.mark.slow
def test_a_worker_ends_with_the_process_that_started_it(directory, tmp_path):  # noqa: F811
    """A worker that has begun to time an engine for a minute, and whose parent is killed."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from lissom.cli.bench import comparison\n"
        "from lissom.cli.bench.engines import ENGINES\n"
        "from lissom.cli.bench.workload import load_model, parse_shapes, prepare\n"
        "started = comparison._start\n"
        "def start(threads, errors):\n"
        "    process = started(threads, errors)\n"
        "    print(process.pid, flush=True)\n"
        "    return process\n"
        "comparison._start = start\n"
        "workload = prepare(load_model(sys.argv[1]), parse_shapes('1x4,2x6'), None, Path(sys.argv[2]))\n"
        "for record in comparison.run_worker(ENGINES['eager'], workload, 1, 5.0):\n"
        "    print(record.shape, flush=True)\n"
    )
    command = [sys.executable, str(script), str(directory), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert parent.stdout.readline() == "1x4\n"
        assert _is_alive(worker)
        parent.kill()
        parent.wait()
        ended = time.monotonic() + 20
        while _is_alive(worker) and time.monotonic() < ended:
            time.sleep(0.05)
        assert not _is_alive(worker)


def _is_alive(pid: int) -> bool:
    """True while a process runs; one that ended and was not waited for is no more."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
