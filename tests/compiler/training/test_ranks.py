"""Tests of training on several ranks: the weights of one process, with whole and sharded weights, and how one ends all."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from lissom.api import Optimized
from lissom.errors import RequirementError
from tests.compiler.training.runs import notes, train, train_bert, train_form, train_words
from tests.support.ranks import printed, run_ranks

pytestmark = pytest.mark.multiprocess

BEGIN = """
import json
from tests.compiler.training.runs import digest, notes, train, train_bert, train_form, train_words
from tests.support.models import FeedForward, normal, seeded
join()

def tell(found):
    curve = [(point.step, point.held_out) for point in found.report.history.steps[-1].curve]
    print(json.dumps({"digest": digest(found), "curve": curve, "notes": notes(found)}), flush=True)
    if rank == 0:
        torch.save({name: tensor.detach() for name, tensor in found.program.weights().items()}, folder / "weights.pt")
"""
END = "\ntorch.distributed.destroy_process_group()\n"


def run(script: str, folder: Path, world_size: int = 2) -> list[dict[str, object]]:
    """What each rank told of its run; all have the same weights."""
    told = [json.loads(lines[-1]) for lines in printed(run_ranks(BEGIN + script + END, folder, world_size))]
    assert len({item["digest"] for item in told}) == 1
    return told


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    """Weights of several ranks, those of one process, and those from before the training.

    Gradients are sums in another order, float32 with unit roundoff 6e-8. AdamW divides a gradient by its own size, so an
    element whose gradient is rounding alone moves by the learning rate in any direction: the bias of keys, which a softmax
    ignores, is left out, and of the others the norm of the difference is compared with the norm of what was learned.
    """
    compared = [name for name in found if found[name].is_floating_point() and not name.endswith("key.bias")]
    off, learned = (
        sum(float((found[name] - other[name]).square().sum()) for name in compared) ** 0.5 for other in (wanted, before)
    )
    assert off <= 1e-3 * learned and learned > 0


def weights(found: Optimized) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in found.program.weights().items()}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shard", ["false", "true"])
def test_ranks_give_the_weights_of_one_process(world_size: int, shard: str, tmp_path: Path) -> None:
    """Seven rows, some with padding: the ranks have other numbers of rows and of real tokens."""
    options = "steps=6,learning_rate=0.0003"
    wanted, before = train_bert(options), train_bert("steps=1,learning_rate=1e-30")
    told = run(f"tell(train_bert('{options},shard={shard}'))", tmp_path, world_size)
    close(torch.load(tmp_path / "weights.pt"), weights(wanted), weights(before))
    curve = [point.held_out for point in wanted.report.history.steps[-1].curve]
    for item in told:
        assert f"{world_size} ranks trained together, each on its rows of every batch" in str(item["notes"])
        # Losses of weights that differ as above; the first one is of the same weights.
        assert [held_out for _, held_out in item["curve"]] == pytest.approx(curve, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["false", "true"])
def test_ranks_skip_the_steps_that_overflow_together(shard: str, tmp_path: Path) -> None:
    """In float16 the rows of one rank may overflow alone, and the scale of losses is that of all."""
    options = "steps=8,learning_rate=0.0003,precision=fp16"
    wanted = notes(train_bert(options))
    overflowed = next(line for line in wanted.splitlines() if "of 8 steps overflowed float16" in line)
    for item in run(f"tell(train_bert('{options},shard={shard}'))", tmp_path):
        assert overflowed in str(item["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["embeddings", "labels", "scales", "regression", "own"])
@pytest.mark.parametrize("rows", [1, 5])
def test_every_loss_is_that_of_the_whole_batch(form: str, rows: int, tmp_path: Path) -> None:
    """With a single row only one of the two ranks has something to count."""
    told = run(f"tell(train_form('{form}', {rows}))", tmp_path)
    wanted, found = train_form(form, rows), torch.load(tmp_path / "weights.pt")
    close(found, weights(wanted), {name: torch.zeros_like(tensor) for name, tensor in found.items()})
    curve = [point.held_out for point in wanted.report.history.steps[-1].curve]
    # Of 1 - cosine near 0 the rounding is absolute: float32 has a unit roundoff of 6e-8 at the cosine of 1.
    assert [held_out for _, held_out in told[0]["curve"]] == pytest.approx(curve, rel=1e-3, abs=5e-7)


@pytest.mark.parametrize("shard", ["false", "true"])
def test_large_vocabularies(shard: str, tmp_path: Path) -> None:
    """Five rows on two ranks: the LM head's losses and gradients, some tokens at a time, add up to those of one process."""
    run(f"tell(train_words('learning_rate=0.003,shard={shard}'))", tmp_path)
    wanted, before = (weights(train_words(f"learning_rate={rate}")) for rate in (0.003, 1e-30))
    close(torch.load(tmp_path / "weights.pt"), wanted, before)


@pytest.mark.parametrize("shard", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_killed_ranks_go_on(shard: str, tmp_path: Path) -> None:
    """All ranks are killed at once; the run that goes on gives the weights of one that was not."""
    script = f"""
    import threading
    started = []
    def progress(what, *_):
        if "left" in what and not started and KILLS:
            started.append(what)
            threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    tell(train("steps=120,shard={shard},checkpoint=" + str(folder / "state"), progress=progress))
    """
    script = "\n".join(line.removeprefix("    ") for line in script.splitlines())
    ended = run_ranks(f"{BEGIN}\nKILLS = True\n{script}", tmp_path)
    assert all(item.status == -signal.SIGKILL for item in ended), [item.err for item in ended]
    step = json.loads((tmp_path / "state" / "state.json").read_text())["state"]["step"]
    found = run(f"\nKILLS = False\n{script}", tmp_path)
    assert f"went on from step {step}, whose state was in" in str(found[1]["notes"])
    wanted = run(f"tell(train('steps=120,shard={shard}'))", tmp_path)
    assert found[0]["digest"] == wanted[0]["digest"]
    again = run(f"\nKILLS = False\n{script}", tmp_path)
    assert again[0]["digest"] == wanted[0]["digest"]


def said(script: str, folder: Path, world_size: int = 2) -> list[list[str]]:
    """The lines of every rank, where an error may leave connections that no rank closes."""
    return printed(run_ranks(f"{BEGIN}{script}\nsys.stdout.flush()\nos._exit(0)", folder, world_size))


@pytest.mark.parametrize(
    ("options", "rows", "name"),
    [("'steps=4,seed=' + str(rank)", "8", "options"), ("'steps=4'", "8 + rank", "data")],
)
def test_ranks_that_differ_are_refused(options: str, rows: str, name: str, tmp_path: Path) -> None:
    for lines in said(f"said(lambda: train({options}, rows={rows}))", tmp_path):
        assert lines[0].startswith(f"RankError 1 of 2 ranks do not have the same {name} as rank 0; call Lissom alike on all")


INTERRUPTED = """
def progress(what, *_):
    if rank == 1 and "left" in what and not started:
        started.append(what)
        os.kill(os.getpid(), signal.SIGINT)
started = []
tell(train("steps=1000", progress=progress))
"""


def test_an_interrupt_on_one_rank_ends_all(tmp_path: Path) -> None:
    for item in run(INTERRUPTED, tmp_path):
        assert "stopped early: it was interrupted; the best weights so far are kept" in str(item["notes"])
        assert "after step 1000" not in str(item["notes"]) and "1000 steps" not in str(item["notes"])


FAILS = """
from lissom.passes.recover.finetune import Finetune
calls = []
def loss(output, labels):
    calls.append(1)
    value = output.square().mean()
    if rank == 1 and len(calls) == 6:
        if HOW == "raise":
            raise ValueError("a fault of one rank")
        if HOW == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return value * float("nan")
    return value
options = dict(steps=50, learning_rate=0.001, precision="fp32", loss=loss)
call = lambda: lissom.optimize(seeded(FeedForward), normal(2, 5, 8), passes=[Finetune(**options)], data=[normal(4, 5, 8)] * 5)
"""


def test_infinite_loss_on_one_rank_ends_all_ranks(tmp_path: Path) -> None:
    for item in run(f"HOW = 'nan'\n{FAILS}\ntell(call())", tmp_path):
        assert "stopped early: the loss or its gradient was not finite after " in str(item["notes"])


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_rank_that_fails_ends_all(how: str, tmp_path: Path) -> None:
    """The others say so at once, and do not wait for the timeout of half an hour."""
    script = f"HOW = '{how}'\n{FAILS}\nsaid(call)\ntime.sleep(5 * (rank == 1))\nsys.stdout.flush()\nos._exit(0)"
    first, second = run_ranks(f"{BEGIN}{script}", tmp_path, seconds=60)
    assert first.out.startswith("RankError a rank that trains with this one ended or did not answer; see what the other ranks")
    assert second.status == (0 if how == "raise" else -signal.SIGKILL)
    if how == "raise":
        assert second.out.startswith("PassError finetune{") and "a fault of one rank" in second.out


def test_rank_0_trains_alone_where_the_others_wait(tmp_path: Path) -> None:
    """A model that is compiled for ranks is made by rank 0."""
    script = """
model = small_llama()
data = [{"input_ids": small_ids()} for _ in range(3)]
passes = "prune-neurons{keep=0.5},distill{steps=3}"
found = lissom.compile(model, data[0], passes=passes, data=data, backend="distributed", goal=None)
print([note for step in found.report.history.steps if step.curve for note in step.notes][-1])
"""
    for lines in said(script, tmp_path):
        assert lines[-1].startswith("3 steps ")


def test_one_process_shards_nothing() -> None:
    with pytest.raises(RequirementError, match="distill: shard=true divides weights among the ranks of a process group, and"):
        train("steps=1,shard=true")
