"""Tests of tools.first_hour on the pretended GPU: each step's parts, faults that are planted, and an interrupted run."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_rows import BATCHES, ROWS, SHAPES, TITLES, Row
from tools.docs.generate import made_with_these_versions
from tools.first_hour.__main__ import chosen_steps, run_step
from tools.first_hour.cards import CARDS, find_card
from tools.first_hour.device import card_name, device
from tools.first_hour.operators import cases, guarded
from tools.first_hour.predictions import Kernel, kernels, lines_of, predict, seconds
from tools.first_hour.report import write_report
from tools.first_hour.results import Result, Results, UsageError
from tools.first_hour.tasks import ROOT, STEPS, Step, Task, gpu_test_files, run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
HANGS = """
import subprocess, sys
child = subprocess.Popen(["sleep", "60"])
print(child.pid, file=sys.stderr, flush=True)
child.wait()
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_running(pid: int) -> bool:
    """False for a process that has ended, whether or not its parent has noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("print('text'); print('[1]')", "done", ""),
        ("raise ValueError('planted')", "failed", "ValueError: planted"),
        ("print('no JSON')", "failed", "printed no JSON but: no JSON"),
        ("import sys; sys.exit(3)", "failed", "exit code 3 without a message"),
        ("import os; os.kill(os.getpid(), 9)", "killed", "ended by SIGKILL, which the system sends where memory runs out"),
    ],
)
def test_how_a_task_ends(code: str, status: str, error: str) -> None:
    found = run("operators", Task("planted", python(code), 30), 30)
    assert (found.status, found.error) == (status, error)
    assert found.data == ([1] if status == "done" else None)


def test_a_task_that_hangs_is_ended_with_all_that_it_started() -> None:
    found = run("operators", Task("planted", python(HANGS), 30), 1)
    assert (found.status, found.error) == ("late", "did not end within 1 seconds")
    # It has been sent SIGKILL, and ends when the system next runs it.
    end = time.monotonic() + 10
    while is_running(int(found.log)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_running(int(found.log))


def test_a_failing_task_ends_no_step_and_comes_first_in_the_report(tmp_path) -> None:
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('1')"
    case = {"case": "planted product", "error": 0.5, "allowed": 0.01, "ok": False}
    tasks = [
        Task("fails", python("raise ValueError('planted')"), 30),
        Task("counts", python(f"{code}; print('[]')"), 30),
        Task("wrong", python(f"print({json.dumps(json.dumps([case]))})"), 30),
    ]
    step = Step("operators", "Operators", 60, lambda pretend: tasks)
    results = Results(tmp_path / "out", "Pretended GPU")
    for _ in range(2):
        run_step(step, results, "Pretended GPU", True)
    assert count.read_text() == "1"  # neither was run again
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert report.index("## Failures: 2") < report.index("## Environment")
    assert "- **operators** fails: failed: ValueError: planted" in report
    assert "- **operators** planted product: relative error 0.5, and 0.01 is allowed" in report
    results.forget("operators")
    run_step(step, results, "Pretended GPU", True)
    assert count.read_text() == "11"


def test_a_step_ends_with_its_time_and_leaves_the_rest_to_the_next_start(tmp_path, capsys) -> None:
    tasks = [Task("first", python("import time; time.sleep(0.6); print('[]')"), 30), Task("second", python(HANGS), 30)]
    results = Results(tmp_path, "Pretended GPU")
    run_step(Step("operators", "Operators", 20.5, lambda pretend: tasks), results, "Pretended GPU", True)
    assert [result.task for result in results.of("operators")] == ["first"]
    assert "operators: its 20 seconds are over; start it again for the rest" in capsys.readouterr().err


def first_hour(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.first_hour", "--out", str(folder), "--pretend", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # A shell that starts something in the background has it ignore SIGINT.
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeding,
    )


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path) -> None:
    begun = first_hour(tmp_path, "--only", "environment,predictions")
    kept = tmp_path / "results" / "environment--environment.json"
    while not kept.exists() and begun.poll() is None:
        time.sleep(0.05)
    begun.send_signal(signal.SIGINT)
    _, errors = begun.communicate(timeout=60)
    assert begun.returncode == 130, errors
    assert "interrupted; start it again to go on" in errors
    assert not list((tmp_path / "results").glob("predictions*"))
    assert "Not run yet: bert-base." in (tmp_path / "report.md").read_text(encoding="utf-8")
    first = kept.stat().st_mtime_ns
    again = first_hour(tmp_path, "--only", "environment,predictions")
    output, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert kept.stat().st_mtime_ns == first
    assert "predictions: bert-base: done" in output
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Everything here is pretended" in report
    assert "| compute capability | 9.0 |" in report
    assert "| bert-base bfloat16 lissom | 8 | " in report
    assert "| not timed |" in report


def test_wrong_arguments_are_named(tmp_path) -> None:
    with pytest.raises(
        UsageError, match=r"finds no GPU here; run this on a machine with one, or try it without one by --pretend"
    ):
        card_name(pretend=False)
    with pytest.raises(UsageError, match=r"no step 'test' among environment, .*; did you mean 'tests'\?"):
        chosen_steps("environment,test")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match=r"--out .*file is a file; name a directory"):
        Results(file, "NVIDIA L4")
    Results(tmp_path / "out", "NVIDIA L4")
    with pytest.raises(UsageError, match=r"holds results of 'NVIDIA L4', and this machine has 'NVIDIA H200'; name another"):
        Results(tmp_path / "out", "NVIDIA H200")


def test_a_half_written_result_is_none(tmp_path) -> None:
    results = Results(tmp_path, "NVIDIA L4")
    (tmp_path / "results" / ".tests--a.json.1").write_text("{", encoding="utf-8")
    assert results.of("tests") == []
    results.add(Result("tests", "tests/a b.py", "late", 1.0, error="did not end"))
    assert results.find("tests", "tests/a b.py") == results.of("tests")[0]


@pytest.mark.parametrize("kind", ["triton", "int8", "attention", "sparse"])
def test_operators_are_right_on_the_pretended_gpu(kind: str) -> None:
    with device(pretend=True), torch.no_grad():
        found = list(cases(kind, pretend=True))
    assert [case for case in found if not case["ok"]] == []
    assert bool(found) == (kind != "sparse")  # of which compute capability 9.0 has none


def test_an_operator_that_raises_is_a_wrong_case() -> None:
    def planted():
        yield {"case": "right", "ok": True}
        raise RuntimeError("CUDA error: planted\nmore")

    assert list(guarded("planted", planted))[1] == {"case": "planted", "ok": False, "how": "RuntimeError: CUDA error: planted"}


def test_the_time_of_a_kernel_by_hand() -> None:
    card = CARDS["H100 SXM"]
    # 1,024 rows by a weight [4096, 4096]: 34.4 GFLOP, and 8.4 + 33.6 + 8.4 MB in half precision.
    kernel = Kernel(2 * 1024 * 4096**2, 2.0 * (2 * 1024 * 4096 + 4096**2), 4096**2, 1024 * 4096)
    row = Row("bert-base", "bfloat16", "lissom")
    assert seconds([kernel], card, row) == pytest.approx(34.36e9 / 989e12 + 2.5e-6, rel=1e-3)
    assert seconds([Kernel(0, 335)], card, Row("bert-base", "bfloat16", "eager")) == pytest.approx(8e-6)
    # Its input is read in 16 bits and written in 8, then multiplied in int8.
    int8 = seconds([kernel], card, Row("bert-base", "bfloat16", "lissom-int8"))
    assert int8 == pytest.approx(3 * 1024 * 4096 / 3350e9 + 34.36e9 / 1979e12 + 5e-6, rel=1e-3)
    one = Kernel(2 * 4096**2, 2.0 * (2 * 4096 + 4096**2), 4096**2, 4096)
    assert seconds([one], card, Row("bert-base", "bfloat16", "lissom-int4")) == pytest.approx(
        (4096**2 / 2 + 16384) / 3350e9 + 2.5e-6
    )


def test_kernels_are_those_of_the_model() -> None:
    tokens, width, patches = 197, 768, 14 * 14
    layer = 2 * tokens * (4 * width**2 + 2 * width * 4 * width) + 4 * tokens**2 * width
    for fused in (False, True):
        one, two = (kernels("vit-b16", layers, "bfloat16", 8, fused) for layers in (1, 2))
        # The convolution of patches comes once.
        assert sum(kernel.flops for kernel in one) == 8 * (layer + 2 * patches * width * 3 * 16**2)
        assert sum(kernel.flops for kernel in two) - sum(kernel.flops for kernel in one) == 8 * layer
        assert sum(kernel.weights for kernel in two) == 2 * 12 * width**2
    loose = kernels("vit-b16", 2, "bfloat16", 8, fused=False)
    assert sum(kernel.bytes for kernel in two) < sum(kernel.bytes for kernel in loose)
    assert predict(Row("vit-b16", "bfloat16", "lissom-fp8"), 8, CARDS["A100 80GB"]) is None


def test_predictions_are_written_down_for_each_row() -> None:
    page = (ROOT / "docs" / "cuda.md").read_text(encoding="utf-8")
    for row in ROWS:
        assert any(
            f"| {row.model} |" in line and row.dtype in line and f"| {TITLES[row.engine]} |" in line
            for line in page.splitlines()
        )
    if made_with_these_versions():
        missing = [line for line in lines_of("vit-b16") if line not in page]
        assert missing == [], "run python -m tools.first_hour.predictions --update"


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", None),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_cards_are_found_by_their_names(name: str, card: str | None) -> None:
    assert find_card(name) == card


def test_steps_cover_all_rows_and_files() -> None:
    tasks = {step.name: {task.name for task in step.tasks(False)} for step in STEPS}
    assert tasks["first-rows"] | tasks["benchmarks"] == {str(row) for row in ROWS}
    assert not tasks["first-rows"] & tasks["benchmarks"]
    assert "tests/backends/eager/test_cuda.py" in tasks["tests"]
    assert len(tasks["tests"]) == len(gpu_test_files())
    assert sum(step.seconds for step in STEPS) <= 2400
    assert {row.model for row in ROWS} == set(SHAPES)
    assert BATCHES == (1, 8, 64)


def test_measured_times_stand_beside_predictions(tmp_path) -> None:
    results = Results(tmp_path, "NVIDIA L4")
    row = {"batch": 8, "median": 4.0, "low": 3.9, "high": 4.1, "cosine": 0.9999, "memory": 10**9, "failed": None}
    late = {**row, "batch": 64, "median": None, "failed": "out of memory: planted"}
    results.add(Result("benchmarks", "bert-base bfloat16 lissom", "done", 9.0, [row, late]))
    results.add(Result("predictions", "bert-base", "done", 9.0, {"bert-base bfloat16 lissom": {"L4": [1.0, 2.0, 3.0]}}))
    write_report(results, "NVIDIA L4", pretend=False)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| bert-base bfloat16 lissom | 8 | 2.00 | 4.00 | 2.00 |" in report
    assert "- **benchmarks** bert-base bfloat16 lissom, batch 64: out of memory: planted" in report
    assert "pretended" not in report.lower()
