"""Small mixtures of experts with random weights, whose experts have stacked weights, and tokens for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
import transformers
from torch import fx, nn

from lissom.compiler.analysis.structure.linear import weight_of
from lissom.compiler.ir.operators import GROUPED_PRODUCTS
from lissom.compiler.ir.program import Program
from tests.support import captures
from tests.support.models import seeded

EXPERTS = 4
HIDDEN = 32
INNER = 64
_SIZES = {
    "vocab_size": 99,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "use_cache": False,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = {**_SIZES, **_LATENT, "num_key_value_heads": 4, "moe_intermediate_size": INNER, "n_routed_experts": EXPERTS}
_GPT_OSS = {**_SIZES, "num_local_experts": EXPERTS, "head_dim": 8, "layer_types": ["full_attention"]}
_QWEN = {**_SIZES, "moe_intermediate_size": INNER, "num_experts": EXPERTS, "head_dim": 8}

MIXTURES: Mapping[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**_SIZES, num_local_experts=EXPERTS)),
    "qwen3-moe": lambda: transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**_QWEN)),
    "deepseek-v3": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**_DEEPSEEK, n_group=1, topk_group=1, n_shared_experts=1, first_k_dense_replace=0)
    ),
    "gpt-oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**_GPT_OSS, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    ),
}
"""Those of GPT-OSS store their weights as [experts, in_features, out_features], and have biases."""


def mixture(name: str) -> nn.Module:
    """A model of this family whose matrices are large enough for its experts to count."""
    model = seeded(MIXTURES[name])
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def samples(count: int = 4, *, length: int = 24) -> list[dict[str, torch.Tensor]]:
    """Token sequences."""
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(3, 99, (2, length), generator=generator)} for _ in range(count)]


def single_token() -> list[dict[str, torch.Tensor]]:
    """Calibration data of one token, which reaches two experts."""
    return [{"input_ids": torch.tensor([[5]])}]


@cache
def program_of(name: str) -> Program:
    """The canonical program of a family, optimized once a session: it is not to be changed."""
    return captures.optimize(mixture(name), samples(1)[0], checks="structural").program


def stacked_products(program: Program) -> list[fx.Node]:
    """The products of rows with the matrices of their experts."""
    return program.nodes(*GROUPED_PRODUCTS)


def stacks(program: Program) -> dict[str, torch.Tensor]:
    """The stacked matrices of experts, by the names of their weights."""
    weights = [weight_of(node) for node in stacked_products(program)]
    return {str(item.target): program.weight(str(item.target)).detach() for item in weights if item is not None}
