"""Tests of sharded."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import lissom
from lissom.compiler.ir.collectives import COLLECTIVES
from lissom.compiler.parallel.partitioned_program import PartitionedProgram
from lissom.compiler.verify.divergence import relative_error, run_samples, tolerance_of
from lissom.errors import PassError, RequirementError, UnsupportedError
from lissom.passes.parallel.partition import Partition
from tests.support import captures
from tests.support.canonical_programs import reasons, run_passes
from tests.support.dead_structure import zero_heads
from tests.support.harness import check_golden, rewrite
from tests.support.models import FeedForward, normal, seeded
from tests.support.neighbours import all_but_slow
from tests.support.sharding import NAMES_AND_SIZES, collectives, decoder_program_of, partition, partitioned, program_of


def test_rewrites() -> None:
    _, history = rewrite("shard{world_size=2},partition", seeded(FeedForward), normal(2, 5, 8))
    check_golden("partition", history.diff(1, 2))


def test_leaves_other_graphs_alone() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x.exp()

    program, history = rewrite("shard{world_size=2},partition", Sum(), normal(2, 5, 8))
    assert history.texts[1] == history.texts[2]
    assert not isinstance(program, PartitionedProgram)


def test_requires_a_plan() -> None:
    with pytest.raises(RequirementError, match=r"every value has a placement on ranks.*put shard right before this pass"):
        rewrite(Partition(), seeded(FeedForward), normal(2, 5, 8))


def test_a_stale_plan_is_refused() -> None:
    program, samples = program_of("llama")
    planned, _ = run_passes("shard{world_size=2}", program, samples)
    gate = planned.nodes(torch.ops.aten.silu.default)[0]
    gate.target, gate.args = torch.ops.aten.cumsum.default, (gate.args[0], -1)
    with pytest.raises(PassError, match="was changed since; put `shard` right before `partition`"):
        run_passes("partition", planned, samples)


@pytest.mark.parametrize(("name", "world_size"), NAMES_AND_SIZES)
def test_numbers(name: str, world_size: int) -> None:
    # The pipeline compares the ranks in lock-step with the program before, at two sizes.
    after, history = partitioned(name, world_size)
    assert reasons(history) == []
    assert len(after.ranks) == world_size
    with torch.no_grad():
        first, *others = after.run_ranks(program_of(name)[1][0])
    assert all(torch.equal(a, b) for rank in others for a, b in zip(first, rank, strict=True))


@pytest.mark.parametrize(
    ("name", "reduces"),
    # One for the embedding, then two a layer, or one where attention and feed-forward are side by side. T5 has three in a
    # decoder layer, and an embedding on either side, of which the second goes with the encoder's last sum. A ViT has no
    # vocabulary.
    [
        ("llama", 5),
        pytest.param("gemma3", 5, marks=pytest.mark.slow),
        ("bert", 5),
        ("gpt2", 5),
        pytest.param("mixtral", 5, marks=pytest.mark.slow),
        ("neox", 3),
        pytest.param("cohere", 3, marks=pytest.mark.slow),
        pytest.param("falcon", 3, marks=pytest.mark.slow),
        pytest.param("t5", 11, marks=pytest.mark.slow),
        ("vit", 4),
    ],
)
def test_communicates_no_more_than_needed(name: str, reduces: int) -> None:
    after, _ = partitioned(name, 2)
    assert collectives(after) == (reduces, 1)


@pytest.mark.parametrize("world_size", all_but_slow([2, 4], 4))
def test_rank_holds_its_share_of_the_bytes(world_size: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    model = seeded(lambda: LlamaForCausalLM(config))
    optimized = captures.optimize(
        model, {"input_ids": torch.randint(0, 4096, (2, 5))}, passes=f"shard{{world_size={world_size}}},partition"
    )
    whole = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    for rank in range(world_size):
        assert optimized.program.of_rank(rank).parameter_bytes <= (1 / world_size + 0.03) * whole


def test_weights_are_views_where_rows_are_neighbours() -> None:
    program, _ = program_of("llama")
    after, _ = partitioned("llama", 2)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        whole = program.weight(name).untyped_storage().data_ptr()
        assert {weights[name].untyped_storage().data_ptr() for weights in after.ranks} == {whole}


def test_packed_projections_are_sharded_in_each_part() -> None:
    program, _ = program_of("gpt2")
    after, _ = partitioned("gpt2", 2)
    name = "transformer.h.0.attn.c_attn.weight"
    q, k, v = program.weight(name).split(32, dim=1)
    for rank, weights in enumerate(after.ranks):
        mine = torch.cat([part[:, 16 * rank : 16 * rank + 16] for part in (q, k, v)], dim=1)
        assert torch.equal(weights[name], mine)


def test_a_tied_embedding_is_sharded_once() -> None:
    after, _ = partitioned("gemma3", 2)
    tables = [name for name, weight in after.weights().items() if tuple(weight.shape) == (31, 32)]
    assert tables == ["lm_head.weight"]
    # 61 rows are sharded as 62: the last of the second rank is zero.
    assert not after.ranks[1][tables[0]][-1].any()


SCHEMES = ("int8-dynamic", "int8-weight", "int4-weight,group=8")
# Each model with each scheme, and both with each number of ranks: nine of the 27 are no slow ones.
QUANTIZED = [
    pytest.param(name, scheme, world_size, marks=[] if (row + column) % 3 == world_size - 2 else pytest.mark.slow)
    for row, name in enumerate(("llama", "gpt2", "bert"))
    for column, scheme in enumerate(SCHEMES)
    for world_size in (2, 3, 4)
]


@pytest.mark.parametrize(("name", "scheme", "world_size"), QUANTIZED)
def test_quantized_layers(name: str, scheme: str, world_size: int) -> None:
    program, samples = program_of(name)
    quantized, _ = run_passes(f"quantize{{scheme={scheme}}},fold-quantized-weights", program, samples)
    after, _ = partition(quantized, samples, world_size)
    stored = [name for name in after.weights() if name.endswith(("int8", "int4"))]
    assert sum(after.weight(name).numel() for name in stored) < 0.8 * sum(quantized.weight(name).numel() for name in stored)


@pytest.mark.parametrize("world_size", [2, 4])
def test_heads_left_by_pruning_need_not_divide(world_size: int) -> None:
    program, samples = program_of("bert")
    zero_heads(program, 0, [1])
    pruned, _ = run_passes("eliminate-dead", program, samples)
    after, history = partition(pruned, samples, world_size)
    assert [site.heads for site in pruned.fact(lissom.compiler.analysis.structure.transformer.structure).attention] == [3, 4]
    notes = " ".join(history.steps[1].notes)
    assert "the attention at encoder.layer.0.attention.self is padded with zeros: 3 as 4" in notes
    last = after.ranks[world_size - 1]["encoder.layer.0.attention.self.query.weight"]
    assert len(last) == 32 // world_size
    assert not last[-8:].any()


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        pytest.param(name, world_size, marks=[] if name == "llama" and world_size < 4 else pytest.mark.slow)
        for name in ("llama", "gemma3", "gpt2", "gpt_neox")
        for world_size in (2, 3, 4)
    ],
)
def test_key_value_caches_are_sharded_by_heads(name: str, world_size: int) -> None:
    program, samples = decoder_program_of(name)
    after, _ = partition(program, samples, world_size)
    before = sum(tensor.numel() for tensor in program.state_tensors())
    held = sum(after.weight(state).numel() for state in after.state)
    groups = program.weight(program.state[0]).shape[1]
    assert held * groups == before * -(-groups // world_size)
    # What the caches hold after a call, put together, is what the program before holds.
    wanted, found = (run_samples(item, samples)[0][1:] for item in (program, after))
    assert max(map(relative_error, wanted, found)) <= tolerance_of(program)


def test_one_rank_runs_alone_with_stand_ins() -> None:
    _, samples = program_of("llama")
    after, _ = partitioned("llama", 2)
    one = after.of_rank(1)
    assert not isinstance(one, PartitionedProgram)
    # An exact pass on one rank's program is checked: the stand-ins are the same before and after it.
    lowered, history = run_passes("merge-projections{always=true}", one, samples)
    assert history.steps[1].rewritten > 0
    assert len(lowered.nodes(*COLLECTIVES)) == len(after.nodes(*COLLECTIVES))


def test_no_backend_runs_ranks_in_one_process() -> None:
    with pytest.raises(UnsupportedError, match=r"choose backend 'distributed', or take .* run `program.of_rank\(rank\)`"):
        captures.compile(seeded(FeedForward), normal(2, 5, 8), passes="shard{world_size=2},partition")


def _run_rank(rank: int, port: int, folder: str, options: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    program, samples = program_of("llama")
    mine = partition(program, samples, 2, options)[0].of_rank(rank)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    with torch.no_grad():
        outputs = [mine.run(sample) for sample in samples]
    torch.save(outputs, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.multiprocess
@pytest.mark.parametrize("options", ["", ",sequence=true"])
def test_two_processes_give_what_the_program_gives(tmp_path: Path, options: str) -> None:
    program, samples = program_of("llama")
    with torch.no_grad():
        wanted = [program.run(sample) for sample in samples]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_run_rank, (port, str(tmp_path), options), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for one, other in zip(wanted, found, strict=True):
            # Sums over two ranks in another order.
            assert max(map(relative_error, one, other)) <= tolerance_of(program)


class Mixer(nn.Module):
    """A depthwise convolution over the tokens between two linear layers."""

    def __init__(self, padding: str | int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.conv = nn.Conv1d(16, 16, 3, groups=16, padding=padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.silu(self.conv(self.up(x).transpose(1, 2)).transpose(1, 2)))


@pytest.mark.parametrize("padding", [1, "same"])
def test_a_depthwise_convolution_is_sharded_by_channels(padding: str | int) -> None:
    x = normal(2, 6, 8)
    program = captures.optimize(seeded(lambda: Mixer(padding)), x).program
    after, _ = partition(program, [[x]], 2)
    assert after.weight("conv.weight").shape == (8, 1, 3)
    for found in after.run_ranks([x]):
        # Two ranks' sums of eight products in another order.
        torch.testing.assert_close(found, program.run([x]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scheme", ["int8-weight", "fp8,granularity=group,group=8", "int8-group,group=8"])
def test_scales_of_padding_are_one(scheme: str) -> None:
    program, samples = program_of("llama")
    quantized, _ = run_passes(f"quantize{{scheme={scheme}}}", program, samples)
    # Four heads are shared as six, and the scales of those that do not exist divide zeros.
    after, _ = partition(quantized, samples, 3)
    for found in after.run_ranks(samples[0]):
        assert max(map(relative_error, quantized.run(samples[0]), found)) <= tolerance_of(program)
