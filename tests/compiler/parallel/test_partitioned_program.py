"""Tests of lissom.compiler.parallel.partitioned_program."""

from __future__ import annotations

import pytest
import torch

from lissom.compiler.parallel.partitioned_program import PartitionedProgram
from lissom.errors import PassError, UnsupportedError
from tests.support.canonical_programs import run_passes
from tests.support.sharding import partition, program_of


def test_ranks_that_do_not_exist() -> None:
    program, samples = program_of("llama")
    after, _ = partition(program, samples, 2)
    with pytest.raises(PassError, match="has no rank 2: it has 2 ranks, 0 to 1"):
        after.of_rank(2)
    with pytest.raises(PassError, match="cannot be changed in a program partitioned for 2 ranks"):
        run_passes("merge-projections{always=true}", after, samples)
    with pytest.raises(PassError, match="cannot be changed in a program partitioned for 2 ranks"):
        after.own_copy()
    with pytest.raises(UnsupportedError, match="partitioned for 2 ranks already"):
        run_passes("shard{world_size=2}", after, samples)


def test_a_copy_has_the_ranks() -> None:
    program, samples = program_of("llama")
    after, _ = partition(program, samples, 2)
    copy = after.copy()
    assert isinstance(copy, PartitionedProgram) and copy.graph is not after.graph
    assert copy.text() == after.text() and copy.ranks is after.ranks


def test_a_value_an_observer_returns_is_sharded() -> None:
    program, samples = program_of("llama")
    after, _ = partition(program, samples, 2)
    silu = after.nodes(torch.ops.aten.silu.default)[0]
    with torch.no_grad():
        values = dict[str, torch.Tensor]()
        before = after.run(samples[0], lambda node, value: values.update({node.name: value}) if node is silu else None)
        assert values[silu.name].shape[-1] == 48  # on a rank 24
        same = after.run_ranks(samples[0], lambda node, value: values[silu.name] if node is silu else None)
        other = after.run(samples[0], lambda node, value: values[silu.name] * 2 if node is silu else None)
    assert all(torch.equal(before[0], outputs[0]) for outputs in same)
    assert not torch.allclose(before[0], other[0])
