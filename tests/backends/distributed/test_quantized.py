"""Quantized layers on ranks: each rank computes them from integers, or names those it does not."""

from __future__ import annotations

import pytest
import torch
import transformers

import lissom
from lissom.backends.distributed.backend import Distributed, lower_rank
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import History
from lissom.errors import UnsupportedError
from lissom.ops import weight_quantized_linear
from lissom.ops.native import missing_int8_kernel
from tests.support.models import seeded

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(missing_int8_kernel(torch.float32, CPU) is not None, reason="no int8 kernel here")
IDS = torch.randint(0, 64, (2, 5), generator=torch.Generator().manual_seed(0))
SCHEMES = ("int8-dynamic", "int8-dynamic,activations=tensor", "int8-static", "int8-group", "int4-dynamic")


def partitioned(scheme: str, world_size: int) -> Program:
    """A Llama with one layer, quantized and partitioned; its row-parallel layers read 64 and 128 inputs."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, use_cache=False
    )
    model = seeded(lambda: transformers.LlamaForCausalLM(config)).eval()
    passes = f"quantize{{scheme={scheme}}},shard{{world_size={world_size}}},partition"
    return lissom.optimize(model, {"input_ids": IDS}, passes=passes, data=[{"input_ids": IDS}]).program


def lowered(program: Program, world_size: int, *, simulate: bool = False) -> tuple[Program, History]:
    return lower_rank(program.of_rank(0), Distributed(world_size), CPU, [[IDS]], "numeric", simulate=simulate)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_layer_runs_in_integers(scheme: str) -> None:
    program, history = lowered(partitioned(scheme, 2), 2)
    assert history.steps[-1].notes[-1] == "5 of 5 quantized layers run in integers"
    assert program.nodes(weight_quantized_linear) == []


def test_groups_that_do_not_fit_the_ranks_are_named() -> None:
    program = partitioned("int8-group", 4)  # a head of 16 for each rank, and groups of 32
    sentence = "no kernel for 1 of 5 quantized layers, first 'model.layers.0.self_attn.o_proj' with int8 .*: a rank takes"
    with pytest.raises(UnsupportedError, match=sentence):
        lowered(program, 4)
    _, history = lowered(program, 4, simulate=True)
    assert history.steps[-1].notes[-1].startswith("4 of 5 quantized layers run in integers; 1 in floating point on quantized")
