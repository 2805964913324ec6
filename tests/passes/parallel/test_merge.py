"""Tests of sums and collectives that are merged."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from lissom.compiler.ir.collectives import ALL_GATHER, ALL_REDUCE
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from tests.support.canonical_programs import run_passes
from tests.support.harness import rewrite
from tests.support.models import Case, normal, seeded, tokens
from tests.support.sharding import collectives, partition, program_of
from tools.zoo.removal import canonical

_SIZES = {"vocab_size": 61, "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "use_cache": False}


def _program(model: nn.Module) -> tuple[Program, list[Sample]]:
    with torch.no_grad():
        return canonical(Case(model, {"input_ids": tokens()}))


def _gptj() -> nn.Module:
    config = transformers.GPTJConfig(
        vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_inner=48, rotary_dim=4, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPTJForCausalLM(config)


def _phi() -> nn.Module:
    return transformers.PhiForCausalLM(transformers.PhiConfig(**_SIZES, intermediate_size=48))


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, intermediate_size=48))


@pytest.mark.parametrize(
    ("build", "each"),
    [pytest.param(_gptj, 1, marks=pytest.mark.slow), pytest.param(_phi, 1, marks=pytest.mark.slow), (_llama, 2)],
)
def test_one_all_reduce_per_layer_with_parallel_parts(build: object, each: int) -> None:
    program, samples = _program(seeded(build))  # pyright: ignore[reportArgumentType]
    after, _ = partition(program, samples, 2)
    # One more for the embedding, and the logits are gathered.
    assert collectives(after) == (1 + 3 * each, 1)


def test_ranges_found_side_by_side_are_found_together() -> None:
    program, samples = program_of("neox")
    quantized, _ = run_passes("quantize{scheme=int8-dynamic},fold-quantized-weights", program, samples)
    after, history = partition(quantized, samples, 2)
    # A layer finds the ranges of what its output and its down projection read, two numbers a token of each, in one message.
    greatest = [node for node in after.nodes(ALL_REDUCE) if node.args[1] == "max"]
    assert len(greatest) == 2
    assert "2 collectives joined others that are ready with them" in history.steps[-1].notes


class Heads(nn.Module):
    """Two heads of one value, or one of the other."""

    def __init__(self, *, chained: bool) -> None:
        super().__init__()
        self.first, self.second, self.chained = nn.Linear(8, 30), nn.Linear(30 if chained else 8, 21), chained

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.first(x)
        return first, self.second(torch.cumsum(first, -1) if self.chained else x)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_gatherings_that_are_ready_together(world_size: int) -> None:
    text = f"shard{{world_size={world_size},plan=[first:column-wise,second:column-wise]}},partition"
    program, _ = rewrite(text, seeded(lambda: Heads(chained=False)), normal(2, 5, 8))
    assert len(program.nodes(ALL_GATHER)) == 1
    program, _ = rewrite(text, seeded(lambda: Heads(chained=True)), normal(2, 5, 8))
    assert sum(collectives(program)) == 2


def test_values_that_are_long_are_sent_apart() -> None:
    text = "shard{world_size=2,plan=[first:column-wise,second:column-wise]},partition"
    program, _ = rewrite(text, seeded(lambda: Heads(chained=False)), normal(2, 20000, 8))
    assert len(program.nodes(ALL_GATHER)) == 2
