"""Tests of lissom.backends.distributed.entry: ranks that refuse inputs, mix calls, call from threads, or stop in a call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import lissom
from tests.support.ranks import printed, run_ranks, small_ids, small_llama

REFUSES = """
join()
model = lissom.load(folder / "model", backend=lissom.Distributed(world_size=2, timeout_seconds=20, shared_memory=SHARED))
refused = {"dtype": small_ids().float(), "vocabulary": small_ids() + 60, "rank": small_ids()[0]}
for who in (0, 1):
    for bad in refused.values():
        said(lambda: model(input_ids=bad if rank == who else small_ids()))
        for tokens in (5, 3):
            print(torch.equal(model(input_ids=small_ids(tokens)).logits, torch.load(folder / f"{tokens}.pt")))
for bad in refused.values():
    said(lambda: model(input_ids=bad))
print(torch.equal(model(input_ids=small_ids()).logits, torch.load(folder / "5.pt")))
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama for two ranks, and what two ranks answer to inputs that none refuses."""
    folder = tmp_path_factory.mktemp("saved")
    lissom.compile(small_llama(), {"input_ids": small_ids()}, backend="distributed", world_size=2).save(folder / "model")
    script = """
    join()
    model = lissom.load(folder / "model")
    for tokens in (5, 3):
        found = model(input_ids=small_ids(tokens)).logits
        if rank == 0:
            torch.save(found, folder / f"{tokens}.pt")
    torch.distributed.destroy_process_group()
    """
    printed(run_ranks(script, folder))
    for tokens in (5, 3):
        with torch.no_grad():
            wanted = small_llama()(input_ids=small_ids(tokens)).logits
        # Sums over ranks in another order: float32 (unit roundoff 6e-8), at most 48 terms in two layers.
        torch.testing.assert_close(torch.load(folder / f"{tokens}.pt"), wanted, rtol=1e-5, atol=1e-5)
    return folder


def _copied(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


both_channels = pytest.mark.parametrize(
    "shared", [True, pytest.param(False, marks=pytest.mark.multiprocess)], ids=["memory", "gloo"]
)


@both_channels
def test_after_refusal_on_one_rank_next_call_is_right(shared: bool, saved: Path, tmp_path: Path) -> None:
    lines = printed(run_ranks(REFUSES.replace("SHARED", str(shared)), _copied(saved, tmp_path)))
    for rank, mine in enumerate(lines):
        for index in range(6):
            sentence, *right = mine[3 * index : 3 * index + 3]
            assert right == ["True", "True"]
            who = 0 if index < 3 else 1
            start = (
                "InputError "
                if rank == who
                else f"RankError rank {who} of LlamaForCausalLM refused its inputs, so no rank ran this call: "
            )
            reason = ("argument 'input_ids' is f32[2, 5]", "the inputs ask for row 1", "argument 'input_ids' is i64[5]")[
                index % 3
            ]
            assert sentence.startswith(start + reason)
        # What all refuse is no error of a rank.
        assert all(sentence.startswith("InputError ") for sentence in mine[18:21])
        assert mine[21:] == ["True"]


THREADS = """
join()
from threading import Thread, Barrier
model = lissom.load(folder / "model", backend=lissom.Distributed(world_size=2, timeout_seconds=3, shared_memory=SHARED))
wanted = {tokens: torch.load(folder / f"{tokens}.pt") for tokens in (5, 3)}
counts, ready = {"right": 0, "wrong": 0}, Barrier(2)
def call(tokens):
    ready.wait()
    for _ in range(50):
        try:
            found = model(input_ids=small_ids(tokens)).logits
        except LissomError as error:
            kind = type(error).__name__ + " " + str(error)
            counts[kind] = counts.get(kind, 0) + 1
        else:
            counts["right" if torch.equal(found, wanted[tokens]) else "wrong"] += 1
threads = [Thread(target=call, args=(tokens,)) for tokens in wanted]
for thread in threads: thread.start()
for thread in threads: thread.join()
import json
print(json.dumps(counts))
"""


@both_channels
def test_calls_from_two_threads_are_right_or_refused(shared: bool, saved: Path, tmp_path: Path) -> None:
    lines = printed(run_ranks(THREADS.replace("SHARED", str(shared)), _copied(saved, tmp_path)))
    for (line,) in lines:
        counts = json.loads(line)
        assert counts.pop("wrong") == 0 and sum(counts.values()) == 100
        refused = [kind for kind in counts if kind.startswith("UnsupportedError ")]
        assert refused == [
            "UnsupportedError LlamaForCausalLM was called while another thread of this rank runs a call with the other ranks; "
            "all ranks make their calls in the same order, so make them one after the other, from one thread"
        ]


@pytest.mark.multiprocess
@both_channels
def test_ranks_that_call_different_models_are_refused(shared: bool, saved: Path, tmp_path: Path) -> None:
    script = f"""
    join()
    models = [lissom.load(folder / "model", backend=lissom.Distributed(world_size=2, shared_memory={shared})) for _ in range(2)]
    said(lambda: models[rank](input_ids=small_ids()))
    said(lambda: models[1](input_ids=small_ids(5) if rank else small_ids(3)))
    said(lambda: models[1](input_ids=small_ids(5).flip(0) if rank else small_ids(5)))
    print(torch.equal(models[1](input_ids=small_ids()).logits, torch.load(folder / "5.pt")))
    torch.distributed.destroy_process_group()
    """
    lines = printed(run_ranks(script, _copied(saved, tmp_path)))
    assert lines[0] == lines[1]
    models, shapes, values, right = lines[0]
    assert "RankError the ranks of LlamaForCausalLM differ in the program they call: LlamaForCausalLM (1) on rank 0" in models
    assert "differ in their inputs: int64[2, 3] on rank 0, int64[2, 5] on rank 1" in shapes
    assert "differ in what their inputs hold, by a checksum" in values
    assert right == "True"


STOPS = """
join()
import lissom.backends.distributed.backend as backend
from lissom.ops.native import load_kernels
load_kernels()
calls = [0]
keep = backend._Collectives._refusing
def breaking(self, collective):
    call = keep(self, collective)
    def stop(*operands):
        calls[0] += 1
        if rank == 1 and calls[0] == 8:
            RAISE
        return call(*operands)
    return stop
backend._Collectives._refusing = breaking
def load():
    return lissom.load(folder / "model", backend=lissom.Distributed(world_size=2, timeout_seconds=20, shared_memory=SHARED))
model = load()
print(torch.equal(model(input_ids=small_ids()).logits, torch.load(folder / "5.pt")))
def call():
    try:
        model(input_ids=small_ids())
    except (RuntimeError, KeyboardInterrupt, MemoryError) as error:
        print(type(error).__name__, error)
    else:
        print("nothing")
took = said(call)
print(took < 10)
said(lambda: model(input_ids=small_ids()))
model = load()
print(torch.equal(model(input_ids=small_ids()).logits, torch.load(folder / "5.pt")))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.multiprocess
@both_channels
@pytest.mark.parametrize(
    "how",
    ["raise RuntimeError('a kernel failed')", "raise MemoryError('of its own')", "signal.raise_signal(signal.SIGINT)"],
    ids=["kernel", "memory", "interrupt"],
)
def test_rank_that_stops_in_call_ends_others_at_once(how: str, shared: bool, saved: Path, tmp_path: Path) -> None:
    script = STOPS.replace("RAISE", how).replace("SHARED", str(shared))
    first, second = printed(run_ranks(script, _copied(saved, tmp_path)))
    ended = "RankError a rank of LlamaForCausalLM ended or did not answer within 20 s; see what the other ranks say"
    assert first[0] == "True" and first[1].startswith(ended) and first[2] == "True" and first[3] == first[1]
    assert second[1].split()[0] in ("RuntimeError", "MemoryError", "KeyboardInterrupt")
    assert (
        second[-2]
        == "RankError LlamaForCausalLM was stopped on this rank while the other ranks waited for it; start all of them again"
    )
    # Where all processes are still there, the model can be loaded again.
    assert first[-1] == second[-1] == "True"


POSITIONS = """
from tests.support.sharding import MODELS
case = MODELS["gpt2"]()
join()
backend = lissom.Distributed(world_size=2, timeout_seconds=20, shared_memory=SHARED)
model = lissom.compile(case.model, case.inputs, passes="remove-no-ops", checks="off", backend=backend)
ids = next(iter(case.inputs.values()))
wanted = model(*case.args, **case.kwargs)[0]
# More tokens than there are positions, which is noticed in the call, after a first sum over the ranks.
said(lambda: model(input_ids=ids.repeat(1, 9)))
print(torch.equal(model(*case.args, **case.kwargs)[0], wanted))
torch.distributed.destroy_process_group()
"""


@pytest.mark.multiprocess
@both_channels
def test_refusal_on_all_ranks_leaves_them_in_step(shared: bool, tmp_path: Path) -> None:
    for said, right in printed(run_ranks(POSITIONS.replace("SHARED", str(shared)), tmp_path, seconds=240)):
        assert said.startswith("InputError the inputs ask for row ") and "has rows 0 to 31" in said
        assert right == "True"
