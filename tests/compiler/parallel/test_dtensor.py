"""Tests of lissom.compiler.parallel.dtensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lissom.compiler.ir.placement import Placed, Span, local_part
from lissom.compiler.parallel.dtensor import dtensor_parts
from lissom.errors import UnsupportedError
from tests.support.ranks import printed, run_ranks

WHOLE = """
from torch.distributed.device_mesh import init_device_mesh
from lissom.compiler.parallel.dtensor import as_dtensors
from tests.support.sharding import partition, program_of
join()
mesh = init_device_mesh("cpu", (2,))
for name in ("llama", "bert"):
    program, samples = program_of(name)
    lockstep, _ = partition(program, samples, 2)
    for found in (lockstep, lockstep.of_rank(rank)):
        weights = as_dtensors(found, mesh)
        same = [torch.equal(item.full_tensor(), program.weight(key)) for key, item in weights.items()]
        print(name, len(weights), all(same), sorted({str(item.placements) for item in weights.values()}))
program, samples = program_of("gpt2")
said(lambda: as_dtensors(partition(program, samples, 2)[0], mesh))
said(lambda: as_dtensors(partition(program_of("llama")[0], samples, 3)[0], mesh))
said(lambda: as_dtensors(program_of("llama")[0], mesh))
"""


@pytest.mark.multiprocess
def test_whole_weights_come_back(tmp_path: Path) -> None:
    lines = printed(run_ranks(WHOLE, tmp_path))
    assert lines[0] == lines[1]
    llama, rank_s, bert, _, packed, size, uncut = lines[0]
    assert llama == rank_s and " True " in llama and "Shard(dim=0)" in llama and "Shard(dim=1)" in llama
    assert " True " in bert
    assert (
        "Error the weight 'transformer.h.0.attn.c_attn.bias' is no DTensor: it is packed, and sharded in each of its" in packed
    )
    assert "is partitioned for 3 ranks, and the mesh is [2]; give one of [3]" in size
    assert "is partitioned for 1 ranks, and the mesh is [2]" in uncut


def test_a_part_is_described() -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    weight = torch.arange(14.0).reshape(7, 2)
    rows = Placed(((0, (Span(1, 7, 1, 2),)),))
    for rank, size in ((0, 4), (1, 3)):
        local, shape, placement = dtensor_parts("w", local_part(weight, rows, rank), rows, 2, rank)
        assert torch.equal(local, weight[4 * rank : 4 * rank + size])
        assert (shape, placement) == ([7, 2], Shard(0))
    assert dtensor_parts("w", weight, Placed(), 2, 0)[1:] == ([7, 2], Replicate())
    assert dtensor_parts("w", weight, Placed(partial=True), 2, 0)[1:] == ([7, 2], Partial())


@pytest.mark.parametrize(
    ("placed", "reason"),
    [
        (Placed(((0, (Span(1, 4, 1, 2),)), (1, (Span(1, 2, 1, 2),)))), "sharded along several dimensions at once"),
        (Placed(((0, (Span(2, 4, 1, 2),)),)), "packed, and sharded in each of its parts"),
        (Placed(((0, (Span(1, 2, 4, 2, 2),)),)), "sharded in 2, and each part is on several of the 4 ranks"),
        (Placed(((0, (Span(1, 3, 4, 4),)),)), "its 3 blocks do not divide among 4 ranks"),
    ],
)
def test_what_has_no_word_is_named(placed: Placed, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=f"the weight 'w' is no DTensor: it.* ?{reason.removeprefix('its ')}"):
        dtensor_parts("w", torch.zeros(4, 2), placed, 4, 0)
