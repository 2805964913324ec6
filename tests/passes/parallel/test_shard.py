"""Tests of shard."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.compiler import node as nodes
from lissom.compiler.errors import PipelineTextError, UnsupportedError
from lissom.compiler.sharding import make_plan, sharded_share
from lissom.passes.parallel.shard import Shard
from tests.models import FeedForward, normal, seeded
from tests.passes.harness import check_golden, rewrite
from tests.passes.parallel.models import MODELS, program_of, reasons, run_passes


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
    assert history.steps[1].notes == ("on 2 ranks: nothing cut; nothing to redistribute",)


@pytest.mark.parametrize("name", MODELS)
def test_every_value_is_placed(name: str) -> None:
    program, samples = program_of(name)
    planned, history = run_passes("shard{ways=4}", program, samples)
    assert all(nodes.placed(node) is not None for node in planned.graph.nodes if node.op != "output")
    assert history.steps[1].relative_error == 0.0
    assert reasons(history) == []
    # What is left are the router of a mixture and nothing else.
    assert sharded_share(planned) >= (0.98 if name == "mixtral" else 1.0)


def test_placements_are_those_of_megatron() -> None:
    from torch.distributed.tensor import Partial, Placement, Replicate
    from torch.distributed.tensor import Shard as Split

    program, samples = program_of("llama")
    planned, _ = run_passes("shard{ways=2}", program, samples)
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


def test_key_value_heads_are_shared_where_there_are_fewer_than_ranks() -> None:
    program, samples = program_of("llama")
    planned, _ = run_passes("shard{ways=4},cut", program, samples)
    name = "model.layers.0.self_attn.k_proj.weight"
    first, second, third, fourth = (weights[name] for weights in planned.ranks)
    assert torch.equal(first, second) and torch.equal(third, fourth) and not torch.equal(second, third)


def test_the_plan_leaves_sites_whole() -> None:
    program, samples = program_of("llama")
    planned, history = run_passes("shard{ways=2,plan=[*.layers.0.mlp:replicate,lm_head:replicate]}", program, samples)
    assert "mlp.gate_proj.weight: f32[48, 32]\n" in planned.text()
    assert len(reasons(history)) == 2
    assert all("stays whole on every rank: the plan says so: " in reason for reason in reasons(history))
    assert "2 attentions, 1 feed-forward, 1 embedding cut" in history.steps[1].notes[0]


def test_the_plan_cuts_layers_of_no_site() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.second(self.first(x)))

    program, _ = rewrite("shard{ways=2},cut", seeded(Chain), normal(2, 5, 8))
    assert program.ranks == ()
    program, history = rewrite("shard{ways=2,plan=[first:column-wise]},cut", seeded(Chain), normal(2, 5, 8))
    assert tuple(program.weight("second.weight").shape) == (8, 6)
    assert "1 layer cut; 1 all-reduce to redistribute" in history.steps[1].notes[0]


def test_an_operator_without_a_rule_gets_its_arguments_whole() -> None:
    class Flipped(FeedForward):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = nn.functional.gelu(self.up(self.norm(x)))
            return x + self.down(hidden + torch.flip(hidden, [1]))

    _, history = rewrite("shard{ways=2,plan=[up:column-wise]},cut", seeded(Flipped), normal(2, 5, 8))
    assert "no rule says how aten.flip works on parts; it gets its arguments whole" in reasons(history)


def test_a_site_that_cannot_be_cut_is_named() -> None:
    program, samples = program_of("vit")
    _, history = run_passes("shard{ways=8}", program, samples)
    assert set(reasons(history)) == {"its attention stays whole on every rank: 4 heads give 8 ranks nothing to share"}


def test_requirements() -> None:
    program, samples = program_of("llama")
    for text, message in {
        "shard": "shard: needs ways",
        "shard{ways=1}": "ways is 1; it takes 2 ranks or more",
        "shard{ways=2,plan=[mlp]}": "plan has 'mlp'; write PATTERN:replicate, PATTERN:column-wise or PATTERN:row-wise",
    }.items():
        with pytest.raises(PipelineTextError, match=message):
            run_passes(text, program, samples)
    with pytest.raises(UnsupportedError, match="no module that is cut has a path like 'mpl'"):
        run_passes("shard{ways=2,plan=[mpl:replicate]}", program, samples)


def test_sums_side_by_side_are_taken_once() -> None:
    # x + attention + feed-forward, in whichever order it is written.
    for name in ("neox", "cohere", "falcon"):
        program, _ = program_of(name)
        layers = [move for move in make_plan(program, 2).moves if "all-reduce" in move.steps]
        assert len(layers) == 3
