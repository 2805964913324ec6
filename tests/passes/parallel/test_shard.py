"""Tests of shard."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.compiler.ir import node as nodes
from lissom.compiler.parallel.partitioned_program import PartitionedProgram
from lissom.compiler.parallel.plan import make_plan, sharded_fraction
from lissom.errors import PipelineTextError, UnsupportedError
from lissom.passes.parallel.shard import Shard
from tests.support.canonical_programs import notes, reasons, run_passes
from tests.support.harness import check_golden, rewrite
from tests.support.models import FeedForward, normal, seeded, tokens
from tests.support.sharding import MODELS, collectives, program_of


def test_rewrites() -> None:
    _, history = rewrite(Shard(2), seeded(FeedForward), normal(2, 5, 8))
    check_golden("shard", history.diff(0, 1))


def test_leaves_other_graphs_alone() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x.exp()

    _, history = rewrite(Shard(2), Sum(), normal(2, 5, 8))
    assert history.texts[0] == history.texts[1]
    assert history.steps[1].rewritten == 0
    assert history.steps[1].notes == ("on 2 ranks: nothing sharded; nothing to redistribute",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("olmo2", "mamba") else ()) for name in MODELS]
)
def test_every_value_is_placed(name: str) -> None:
    program, samples = program_of(name)
    planned, history = run_passes("shard{world_size=4}", program, samples)
    assert all(nodes.placed(node) is not None for node in planned.graph.nodes if node.op != "output")
    assert history.steps[1].relative_error == 0.0
    assert reasons(history) == []
    # What is left are the router of a mixture and nothing else.
    assert sharded_fraction(planned) >= (0.98 if name == "mixtral" else 1.0)


def test_placements_are_those_of_megatron() -> None:
    from torch.distributed.tensor import Partial, Placement, Replicate
    from torch.distributed.tensor import Shard as Split

    program, samples = program_of("llama")
    planned, _ = run_passes("shard{world_size=2}", program, samples)
    found: dict[str, tuple[Placement, ...]] = {}
    for node in planned.graph.nodes:
        placed = nodes.placed(node)
        if node.op == "get_attr" and "layers.1" in str(node.target) and not isinstance(placed, tuple) and placed is not None:
            found[str(node.target).removeprefix("model.layers.1.").removesuffix(".weight")] = placed.placements
    by_columns = dict.fromkeys(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"), (Split(0),)
    )
    by_rows = dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), (Split(1),))
    whole = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (Replicate(),))
    assert found == by_columns | by_rows | whole
    (down, *_) = [node for node in planned.nodes() if nodes.origin(node).module_path.endswith("mlp.down_proj")]
    placed = nodes.placed(down)
    assert placed is not None and not isinstance(placed, tuple) and placed.placements == (Partial(),)


def test_key_value_heads_are_replicated_with_fewer_than_ranks() -> None:
    program, samples = program_of("llama")
    planned, _ = run_passes("shard{world_size=4},partition", program, samples)
    name = "model.layers.0.self_attn.k_proj.weight"
    first, second, third, fourth = (weights[name] for weights in planned.ranks)
    assert torch.equal(first, second) and torch.equal(third, fourth) and not torch.equal(second, third)


def test_the_plan_leaves_sites_whole() -> None:
    program, samples = program_of("llama")
    planned, history = run_passes("shard{world_size=2,plan=[*.layers.0.mlp:replicate,lm_head:replicate]}", program, samples)
    assert "mlp.gate_proj.weight: f32[48, 32]\n" in planned.text()
    assert len(reasons(history)) == 2
    assert all("stays whole on every rank: the plan says so: " in reason for reason in reasons(history))
    assert "2 attentions, 1 feed-forward, 1 embedding sharded" in history.steps[1].notes[0]


def test_the_plan_shards_layers_of_no_site() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.second(self.first(x)))

    program, _ = rewrite("shard{world_size=2,fraction=0},partition", seeded(Chain), normal(2, 5, 8))
    assert not isinstance(program, PartitionedProgram)
    program, history = rewrite("shard{world_size=2,plan=[first:column-wise]},partition", seeded(Chain), normal(2, 5, 8))
    assert tuple(program.weight("second.weight").shape) == (8, 6)
    assert "1 layer sharded; 1 all-reduce to redistribute" in history.steps[1].notes[0]


class Rolled(nn.Module):
    """Layers with features moved between them by one place, so that no two are a pair; the last gives two scores."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.second, self.scores = nn.Linear(8, width), nn.Linear(width, 8), nn.Linear(8, 2)
        self.norm = nn.LayerNorm(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.scores(self.second(self.first(x).roll(1, -1)).roll(1, -1)))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_layers_of_no_pair_are_sharded_by_themselves(world_size: int) -> None:
    # 14 features do not divide by 3 and 4, and 8 do not by 3; two scores are too few for more than 2 ranks.
    program, history = rewrite(
        f"shard{{world_size={world_size},fraction=1}},partition", seeded(lambda: Rolled(14)), normal(2, 5, 8)
    )
    assert tuple(program.weight("first.weight").shape) == (-(-14 // world_size), 8)
    assert tuple(program.weight("second.weight").shape) == (-(-8 // world_size), 14)
    assert tuple(program.weight("scores.weight").shape) == ((1, 8) if world_size == 2 else (2, -(-8 // world_size)))
    assert collectives(program) == ((0, 3) if world_size == 2 else (1, 2))
    sharded = (
        "3 gathered layers sharded; 3 all-gathers" if world_size == 2 else "2 gathered layers, 1 summed layer sharded; 1 slice"
    )
    assert sharded in history.steps[1].notes[0]


def test_the_fraction_says_how_many() -> None:
    # 112, 112 and 16 weights: layers of one size are sharded all or none, the largest first.
    for fraction, wanted in (("0", 0), ("0.01", 2), ("0.93", 2), ("1", 3)):
        program, _ = rewrite(f"shard{{world_size=2,fraction={fraction}}}", seeded(lambda: Rolled(14)), normal(2, 5, 8))
        weights = [node for node in program.graph.find_nodes(op="get_attr") if str(node.target).endswith("weight")]
        assert sum(str(nodes.placed(node)) == "Shard(0)" for node in weights) == wanted
    program, _ = rewrite("shard{world_size=2,plan=[first:replicate]}", seeded(lambda: Rolled(14)), normal(2, 5, 8))
    assert "first.weight: f32[14, 8]\n" in program.text()
    with pytest.raises(PipelineTextError, match=r"fraction is 1\.5; it is a part of the weights"):
        rewrite("shard{world_size=2,fraction=1.5}", seeded(Rolled), normal(2, 5, 8))


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int4-weight,group=8"])
def test_quantized_layers_of_no_pair(scheme: str) -> None:
    # 4 and 2 columns to a rank; the scores' layer is sharded by its 8 rows where each rank gets no score, through one group of
    # 8.
    for world_size in (2, 4):
        passes = f"quantize{{scheme={scheme}}},fold-quantized-weights,shard{{world_size={world_size},fraction=1}},partition"
        program, _ = rewrite(passes, seeded(lambda: Rolled(16)), normal(2, 5, 8))
        assert collectives(program)[1] == (3 if world_size == 2 else 2)


def test_a_recurrence_is_sharded_by_its_channels() -> None:
    for name, layers in (("mamba", 2), ("mamba2", 1)):
        program, samples = program_of(name)
        planned, history = run_passes("shard{world_size=4},partition", program, samples)
        assert reasons(history) == []
        # The embedding and the logits; behind each mixer a sum, and one within it: for Mamba of what the recurrence depends on,
        # for Mamba 2 of the squares that its norm divides by.
        assert collectives(planned) == (1 + 2 * layers, 1)


def test_hashed_tables_and_stacked_matrices_are_shared() -> None:
    class Hashed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(31, 8), nn.LayerNorm(8)
            self.up, self.down = nn.Parameter(torch.randn(2, 12, 8)), nn.Parameter(torch.randn(2, 8, 12))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.table((ids * 7 + 3) % 31)
            parts = [nn.functional.linear(nn.functional.linear(x, self.up[k]).relu(), self.down[k]) for k in range(2)]
            return self.norm(parts[0] + parts[1])

    program, _ = rewrite("shard{world_size=2},partition", seeded(Hashed), tokens(2, 5))
    assert tuple(program.weight("table.weight").shape) == (16, 8)
    assert program.weight("up").numel() == program.weight("down").numel() == 96


def test_norms_over_all_heads_stay_sharded() -> None:
    program, samples = program_of("olmo2")
    for world_size in (2, 3, 4):
        # Two key/value heads of 4 ranks: each is held by two, and counted once.
        _, history = run_passes(f"shard{{world_size={world_size}}},partition", program, samples)
        assert reasons(history) == []
        assert "4 calls of aten.rms_norm read a sharded dimension: 1 number per row exchanged, not gathered" in notes(history)


def test_an_operator_without_a_rule_gets_its_arguments_whole() -> None:
    class Flipped(FeedForward):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = nn.functional.gelu(self.up(self.norm(x)))
            return x + self.down(hidden + torch.flip(hidden, [1]))

    _, history = rewrite("shard{world_size=2,plan=[up:column-wise]},partition", seeded(Flipped), normal(2, 5, 8))
    assert "no rule says how aten.flip works on shards; it gets its arguments whole" in reasons(history)


def test_a_site_that_cannot_be_sharded_is_named() -> None:
    program, samples = program_of("vit")
    _, history = run_passes("shard{world_size=8}", program, samples)
    assert set(reasons(history)) == {"its attention stays whole on every rank: 4 heads are too few for 8 ranks"}


def test_requirements() -> None:
    program, samples = program_of("llama")
    for text, message in {
        "shard": "shard: needs world_size",
        "shard{ranks=2}": "shard has no option 'ranks'; its options: world_size, plan",
        "shard{world_size=1}": "world_size is 1; tensor parallelism takes 2 ranks or more",
        "shard{world_size=2,plan=[mlp]}": "plan has 'mlp'; write PATTERN:replicate, PATTERN:column-wise or PATTERN:row-wise",
    }.items():
        with pytest.raises(PipelineTextError, match=message):
            run_passes(text, program, samples)
    with pytest.raises(UnsupportedError, match="no shardable module has a path like 'mpl'"):
        run_passes("shard{world_size=2,plan=[mpl:replicate]}", program, samples)


def test_sums_side_by_side_are_taken_once() -> None:
    # x + attention + feed-forward, in whichever order it is written.
    for name in ("neox", "cohere", "falcon"):
        program, _ = program_of(name)
        layers = [move for move in make_plan(program, 2).moves if "all-reduce" in move.steps]
        assert len(layers) == 3
