"""What tests of sharding share: canonical programs of small models of many families, sharded and compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import transformers

from lissom.compiler.ir.collectives import ALL_GATHER, ALL_REDUCE
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.parallel.partitioned_program import PartitionedProgram
from lissom.compiler.pipeline.history import History
from lissom.frontends.generation.decoder import capture_decoder
from tests.support.canonical_programs import programs_of, run_passes
from tests.support.decoders import DECODERS
from tests.support.models import Case, normal, seeded, tokens

_SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_RECURRENT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_MAMBA2 = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4}


def _causal(name: str, config: transformers.PretrainedConfig) -> Case:
    config.use_cache = False
    model = seeded(lambda: getattr(transformers, name)(config))
    return Case(model, {"input_ids": tokens()})


def _t5() -> Case:
    config = transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", use_cache=False
    )
    model = seeded(lambda: transformers.T5ForConditionalGeneration(config))
    return Case(model, {"input_ids": tokens(), "decoder_input_ids": tokens(2, 4, seed=1), "use_cache": False})


def _vit() -> Case:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    return Case(seeded(lambda: transformers.ViTModel(config)), {"pixel_values": normal(2, 3, 16, 16)})


MODELS: dict[str, Callable[[], Case]] = {
    "llama": lambda: _causal("LlamaForCausalLM", transformers.LlamaConfig(**_GROUPED)),
    "gemma3": lambda: _causal("Gemma3ForCausalLM", transformers.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=4)),
    "neox": lambda: _causal("GPTNeoXForCausalLM", transformers.GPTNeoXConfig(**_SIZES)),
    "mixtral": lambda: _causal("MixtralForCausalLM", transformers.MixtralConfig(**_GROUPED, num_local_experts=4)),
    "cohere": lambda: _causal("CohereForCausalLM", transformers.CohereConfig(**_GROUPED)),
    "falcon": lambda: _causal("FalconForCausalLM", transformers.FalconConfig(**_SIZES, multi_query=True, alibi=False)),
    "olmo2": lambda: _causal("Olmo2ForCausalLM", transformers.Olmo2Config(**_GROUPED, eos_token_id=0, pad_token_id=0)),
    "mamba": lambda: _causal("MambaForCausalLM", transformers.MambaConfig(**_RECURRENT, state_size=8)),
    # One layer, which its export unrolls into some thousand operators.
    "mamba2": lambda: _causal(
        "Mamba2ForCausalLM", transformers.Mamba2Config(**_RECURRENT | {"num_hidden_layers": 1}, **_MAMBA2)
    ),
    "bert": lambda: _causal("BertModel", transformers.BertConfig(**_SIZES)),
    "gpt2": lambda: _causal(
        "GPT2LMHeadModel",
        transformers.GPT2Config(
            vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0, pad_token_id=0
        ),
    ),
    "t5": _t5,
    "vit": _vit,
}


# Three ranks divide nearly nothing evenly. Two and four are tried with heads that share keys and with a packed projection; the
# others are slow, since they run through the same rules.
QUICK = {3: ("llama", "gpt2", "bert", "vit")}
"""What is checked with every change, by the number of ranks; where none is given, Llama."""
NAMES_AND_SIZES = [
    pytest.param(name, world_size, marks=[] if name in QUICK.get(world_size, ("llama",)) else pytest.mark.slow)
    for name in MODELS
    for world_size in (2, 3, 4)
]
program_of = programs_of(MODELS)


@cache
def _decoder(name: str) -> tuple[Program, list[Sample]]:
    captured = capture_decoder(seeded(DECODERS[name]), max_length=16, batch=2)
    return run_passes("generation", captured.program, captured.samples)[0], captured.samples


def decoder_program_of(name: str) -> tuple[Program, list[Sample]]:
    """A program of one of the decoders after the recipe `generation`, the caller's own, and its inputs."""
    program, samples = _decoder(name)
    return program.copy(), samples


def partition(
    program: Program, samples: list[Sample], world_size: int, options: str = ""
) -> tuple[PartitionedProgram, History]:
    """The program partitioned for so many ranks, compared with the one before."""
    after, history = run_passes(f"shard{{world_size={world_size}{options}}},partition", program, samples)
    assert isinstance(after, PartitionedProgram)
    return after, history


@cache
def partitioned(name: str, world_size: int, options: str = "") -> tuple[Program, History]:
    """A program of one of the models partitioned, as `partition` does, once a session: not to be changed."""
    return partition(*program_of(name), world_size, options)


def collectives(program: Program) -> tuple[int, int]:
    """How many all-reduces and all-gathers there are."""
    return len(program.nodes(ALL_REDUCE)), len(program.nodes(ALL_GATHER))
