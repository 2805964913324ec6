"""Tests of checkpoints: runs that are killed go on, finished ones give their result, and what does not fit is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lissom.errors import ArtifactError, PipelineTextError
from lissom.passes.recover.distill import Distill
from tests.compiler.training.runs import digest, names, notes, train
from tests.support.ranks import printed, run_ranks

KILLED = """
import threading
from tests.compiler.training.runs import digest, notes, train

def end():
    os.kill(os.getpid(), signal.SIGKILL)

def watch():
    # In the middle of writing the tensors, or between them and the state.
    while not list((folder / "state").glob(".lissom-*")):
        pass
    end()

def progress(what, *_):
    if "left" in what and not started:
        started.append(what)
        if WHEN is None:
            threading.Thread(target=watch, daemon=True).start()
        else:
            threading.Timer(WHEN, end).start()

started = []
found = train("steps=4000,checkpoint=" + str(folder / "state"), progress=progress if KILLS else None)
print(digest(found))
print(notes(found))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_run_goes_on_and_gives_same_weights(tmp_path: Path) -> None:
    steps = []
    for when in (0.05, 0.3, 0.15, None, 0.4, None):
        (ended,) = run_ranks(f"KILLS, WHEN = True, {when}\n{KILLED}", tmp_path, 1)
        assert ended.status == -signal.SIGKILL, ended.err
        if (tmp_path / "state" / "state.json").exists():
            steps.append(json.loads((tmp_path / "state" / "state.json").read_text())["state"]["step"])
    assert steps == sorted(steps) and steps[-1] > steps[0]
    ((found, *said),) = printed(run_ranks(f"KILLS, WHEN = False, None\n{KILLED}", tmp_path, 1))
    assert f"went on from step {steps[-1]}, whose state was in '" in "\n".join(said)
    shutil.rmtree(tmp_path / "state")
    ((wanted, *said),) = printed(run_ranks(f"KILLS, WHEN = False, None\n{KILLED}", tmp_path, 1))
    assert found == wanted and "went on" not in "\n".join(said)
    assert names(tmp_path / "state") == ["result.safetensors", "state.json"]


@pytest.fixture(scope="module", autouse=True)
def ctrl_c() -> Iterator[None]:
    """Workers of pytest-xdist ignore Ctrl-C; the tests press it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_at(step: int) -> Callable[..., None]:
    """Presses Ctrl-C when so many steps are done."""
    reports: list[str] = []

    def progress(what: str, *_: object) -> None:
        if "left" in what:
            reports.append(what)
            if len(reports) == step:
                os.kill(os.getpid(), signal.SIGINT)

    return progress


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_ctrl_c_leaves_a_state_to_go_on_from(precision: str, tmp_path: Path) -> None:
    options = f"steps=60,precision={precision}"
    wanted = train(options)
    options += f",checkpoint={tmp_path / 'new' / 'state'}"
    for step in (17, 20):
        found = train(options, progress=interrupted_at(step))
        assert "stopped early: it was interrupted; the best weights so far are kept" in notes(found)
    found = train(options)
    # The step that follows an interrupt ends, twice.
    assert f"went on from step {17 + 1 + 20 + 1}, whose state was in" in notes(found)
    assert digest(found) == digest(wanted)
    curves = [
        [(point.step, point.loss, point.held_out) for point in item.report.history.steps[-1].curve] for item in (found, wanted)
    ]
    assert curves[0] == curves[1]


def test_a_finished_run_gives_its_result(tmp_path: Path) -> None:
    options = f'steps=30,checkpoint="{tmp_path / "with space"}"'
    first = train(options)
    told: list[str] = []
    again = train(options, progress=lambda what, *_: told.append(what))
    assert digest(first) == digest(again) and "went on from step 30" in notes(again)
    assert not any("left" in what for what in told)
    assert again.report.history.steps[-1].curve == first.report.history.steps[-1].curve
    assert again.report.history.steps[-1].rewritten == first.report.history.steps[-1].rewritten > 0


@pytest.mark.slow
def test_minutes_count_what_was_used(tmp_path: Path) -> None:
    options = f"minutes=0.05,checkpoint={tmp_path}"
    train(options, progress=interrupted_at(20))
    used = json.loads((tmp_path / "state.json").read_text())["state"]["seconds"]
    found = train(options)
    assert 0 < used < 3 <= found.report.history.steps[-1].curve[-1].seconds < 6


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, ctrl_c: None) -> Path:
    """The state of a run that was interrupted."""
    folder = tmp_path_factory.mktemp("written") / "state"
    train(f"steps=30,checkpoint={folder}", progress=interrupted_at(10))
    return folder


@pytest.mark.parametrize(
    ("options", "rows", "what"),
    [
        ("steps=31", 8, "options"),
        ("steps=30,seed=1", 8, "options"),
        ("steps=30", 7, "data"),
    ],
)
def test_the_directory_of_another_run_is_refused(options: str, rows: int, what: str, written: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"holds the state of another run, without the same {what}; choose another"):
        train(f"{options},checkpoint={written}", rows=rows)


def changed(**fields: object) -> Callable[[Path], None]:
    """Writes other values into the state."""

    def change(folder: Path) -> None:
        data = json.loads((folder / "state.json").read_text())
        data["state"] |= fields
        (folder / "state.json").write_text(json.dumps(data))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Changes the tensors of the state."""

    def rewrite(folder: Path) -> None:
        (path,) = folder.glob("step-*.safetensors")
        found = load_file(path)
        change(found)
        save_file(found, path)

    return rewrite


def linked(folder: Path) -> None:
    (path,) = folder.glob("step-*.safetensors")
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")


def cut(folder: Path) -> None:
    (path,) = folder.glob("step-*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / "state.json").write_text("{"), "holds no JSON that can be read"),
        (lambda folder: (folder / "state.json").write_text("[]"), "is not the state of a run: there is no field 'format'"),
        (changed(step=-1), "is not the state of a run: -1 is negative"),
        (changed(seconds="x"), "is not of type float"),
        (changed(seconds=float("nan")), "it used nan seconds"),
        (changed(order=[0, 0]), "its order is not one of 11 batches"),
        (changed(order=[99]), "its order is not one of 11 batches"),
        (changed(curve=[]), "its curve has no points"),
        (changed(updates={"elsewhere.weight": 3}), "it has other weights"),
        (changed(stopped="a\nb"), "is not a name"),
        (changed(precision="int1"), "its precision is 'int1'"),
        (changed(precision="fp16"), "its precision is 'fp16', without a scale of losses"),
        (changed(scale={"factor": 2.0, "lasted": 0, "skipped": 0}), "its precision is 'fp32', with a scale of losses"),
        (changed(scale={"factor": 0.0, "lasted": 0, "skipped": 0}), r"its losses are scaled by 0\.0"),
        (changed(scale=[1.0]), "there is no field 'factor'"),
        (changed(step=7), r"there is no file '.*step-7\.safetensors'"),
        (tensors(lambda found: found.pop("best/up.weight")), "it holds tensors of other names"),
        (tensors(lambda found: found.update({"best/up.weight": torch.ones(3)})), r"is F32 \[3\], not \[6, 8\]"),
        (tensors(lambda found: found.update({"best/up.weight": found["best/up.weight"].half()})), "is F16"),
        (tensors(lambda found: found["weight/up.weight"].fill_(float("nan"))), "holds infinities or NaN"),
        (tensors(lambda found: found["order-generator"].fill_(7)), "its random generators: "),
        (linked, "is a symbolic link"),
        (cut, "does not fit its run"),
    ],
)
def test_a_hostile_state_is_refused(change: Callable[[Path], None], sentence: str, written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "state")
    change(tmp_path / "state")
    with pytest.raises(ArtifactError, match=sentence):
        train(f"steps=30,checkpoint={tmp_path / 'state'}")


def test_directory_in_use_or_out_of_reach_is_refused(written: Path, tmp_path: Path) -> None:
    import fcntl

    handle = os.open(written, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ArtifactError, match=r"another process trains in '.*'; wait for it, or name another"):
            train(f"steps=30,checkpoint={written}")
    finally:
        os.close(handle)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot be used: (Not a directory|File exists)"):
        train(f"steps=1,checkpoint={tmp_path / 'file'}")


def test_a_full_disk_is_noted_and_training_goes_on(tmp_path: Path) -> None:
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        found = train(f"steps=60,checkpoint={tmp_path / 'state'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert notes(found).count("the state of the run was not written, and training went on: ") == 1
    assert found.report.history.steps[-1].rewritten
    assert names(tmp_path / "state") == []


def test_options() -> None:
    with pytest.raises(ValueError, match="checkpoint is ''; give the path of a directory, as text"):
        Distill(checkpoint="")
    with pytest.raises(PipelineTextError, match="option 'shard' of distill takes true or false"):
        train("shard=2")


def test_files_of_other_programs_are_kept(tmp_path: Path) -> None:
    """Others may write files of the same names; those that Lissom wrote have a note in their header."""
    save_file({"theirs": torch.ones(2)}, tmp_path / "step-2-rank-3.safetensors")
    with pytest.raises(
        ArtifactError, match=r"holds 'step-2-rank-3\.safetensors', which no run of Lissom wrote, and this run may"
    ):
        train(f"steps=20,checkpoint={tmp_path}")
    assert names(tmp_path) == ["step-2-rank-3.safetensors"]
    (tmp_path / "step-2-rank-3.safetensors").unlink()
    train(f"steps=20,checkpoint={tmp_path}", progress=interrupted_at(5))
    save_file({"theirs": torch.ones(2)}, tmp_path / "step-1.safetensors")
    (tmp_path / ".lissom-0123456789abcdef").write_text("what another process writes")
    train(f"steps=20,checkpoint={tmp_path}")
    assert names(tmp_path) == [".lissom-0123456789abcdef", "result.safetensors", "state.json", "step-1.safetensors"]


def test_a_file_of_another_program_is_not_replaced(tmp_path: Path) -> None:
    train(f"steps=20,checkpoint={tmp_path}", progress=interrupted_at(5))
    save_file({"theirs": torch.ones(2)}, tmp_path / "result.safetensors")
    found = train(f"steps=20,checkpoint={tmp_path}")
    assert "the state of the run was not written, and training went on: " in notes(found)
    assert list(load_file(tmp_path / "result.safetensors")) == ["theirs"]


def test_what_a_killed_run_left_is_deleted(tmp_path: Path) -> None:
    train(f"steps=20,checkpoint={tmp_path}", progress=interrupted_at(5))
    (path,) = tmp_path.glob("step-*.safetensors")
    (tmp_path / ".lissom-0123456789abcdef").write_bytes(path.read_bytes()[:500])
    train(f"steps=20,checkpoint={tmp_path}")
    assert names(tmp_path) == ["result.safetensors", "state.json"]
