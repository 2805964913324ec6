"""Tests of channels: what ranks give each other through shared memory is what they give each other over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.neighbours import all_but_slow
from tests.support.ranks import printed, run_ranks

EXCHANGES = """
join()
from lissom.backends.distributed.channels import SLOT_BYTES
from lissom.backends.distributed.ranks import Ranks
world_size = torch.distributed.get_world_size()
channels = [Ranks(10.0, shares).channel(torch.device("cpu")) for shares in (True, False)]
print(*(type(channel).__name__ for channel in channels))
generator = torch.Generator().manual_seed(rank)
# Nothing, one number, a slot of float32 and what does not fill one; whole numbers, whose sums are the same in any order.
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64):
    for count in (0, 1, 3, SLOT_BYTES // 4, SLOT_BYTES // 2 + 17):
        x = torch.randint(-9, 9, (world_size * count,), generator=generator).to(dtype)
        found = []
        for channel in channels:
            mine = []
            for operation in ("sum", "max"):
                mine += [x.clone(), x.new_empty(count)]
                channel.reduce(mine[-2], operation)
                channel.scatter(mine[-1], x, operation)
            mine.append(x.new_empty(world_size * world_size * count))
            channel.gather(mine[-1], x)
            found.append(mine)
        assert all(torch.equal(a, b) for a, b in zip(*found)), (dtype, count)
flags = torch.tensor([rank == 0, True])
every = torch.empty(2 * world_size, dtype=torch.bool)
channels[0].gather(every, flags)
print(every.tolist() == [True, True] + [False, True] * (world_size - 1))
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("world_size", all_but_slow([2, 3], 2))
def test_shared_memory_gives_what_gloo_gives(world_size: int, tmp_path: Path) -> None:
    for lines in printed(run_ranks(EXCHANGES, tmp_path, world_size)):
        assert lines == ["SharedMemory GroupChannel", "True"]


@pytest.mark.parametrize(
    "cause",
    [
        # No room on rank 0, and no kernels on rank 1.
        "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "if rank == 0: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))",
        "if rank == 1: os.environ['LISSOM_NATIVE'] = '0'",
    ],
    ids=["no room", "no kernels"],
)
def test_all_ranks_use_gloo_where_one_cannot_share_memory(cause: str, tmp_path: Path) -> None:
    script = f"""
{cause}
join()
from lissom.backends.distributed.ranks import Ranks
channel = Ranks(10.0).channel(torch.device("cpu"))
x = torch.ones(3)
channel.reduce(x, "sum")
print(type(channel).__name__, x.tolist())
torch.distributed.destroy_process_group()
"""
    assert printed(run_ranks(script, tmp_path)) == [["GroupChannel [2.0, 2.0, 2.0]"]] * 2


OPENS = """
join()
from lissom.backends.distributed.ranks import Ranks
def held():
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), sum("memfd:lissom" in line for line in maps)
ranks = Ranks(10.0)
first = None
for turn in range(100):
    channel = ranks._share_memory()
    x = torch.ones(3)
    channel.reduce(x, "sum")
    assert x.tolist() == [2.0] * 3
    del channel
    first = first or held()
last = held()
# gloo opens and closes a socket when it likes to; what is not given back would be 99 more.
print(abs(last[0] - first[0]) < 10, first[1], last[1])
torch.distributed.destroy_process_group()
"""


def test_memory_and_handles_are_given_back(tmp_path: Path) -> None:
    """100 times: no descriptor and no memory more than after the first time."""
    assert printed(run_ranks(OPENS, tmp_path)) == [["True 0 0"]] * 2


@pytest.mark.multiprocess
def test_rank_that_is_killed_leaves_no_memory_with_name(tmp_path: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    script = """
    join()
    from lissom.backends.distributed import ranks
    keep = ranks.attach
    def killed(path):
        # Rank 0 has made the memory, and nobody has mapped it.
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return keep(path)
    ranks.attach = killed
    print(said(lambda: ranks.Ranks(10.0).channel(torch.device("cpu"))) < 8)
    """
    found = run_ranks(script, tmp_path)
    sentence, in_time = found[1].out.splitlines()
    assert sentence.startswith("RankError a rank of this process group ended or did not answer") and in_time == "True"
    assert set(Path("/dev/shm").iterdir()) <= before
