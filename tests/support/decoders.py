"""Small causal language models of many families with random weights, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import transformers
from torch import nn

from tests.support.models import seeded

VOCABULARY = 99
MAX_LENGTH = 64
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDE = {**_SIZES, "intermediate_size": 64, "max_position_embeddings": MAX_LENGTH}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

DECODERS: Mapping[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_GROUPED)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            **_GROUPED, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=8)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_GROUPED, head_dim=8)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**_GROUPED, sliding_window=8)),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**_WIDE)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**_WIDE)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=MAX_LENGTH, **_ENDS)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**_SIZES, ffn_dim=64, max_position_embeddings=MAX_LENGTH, word_embed_proj_dim=32)
    ),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    ),
}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12}
_SCANS = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
}
_MAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 4}
RECURRENT: Mapping[str, Callable[[], nn.Module]] = {
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, **_ENDS)
    ),
    "zamba": lambda: transformers.ZambaForCausalLM(
        transformers.ZambaConfig(
            **{**_GROUPED, **_MAMBA, **_ENDS, "num_hidden_layers": 3},
            n_mamba_heads=2,
            attention_hidden_size=64,
            layers_block_type=["mamba", "hybrid", "hybrid"],
        )
    ),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_heads=4,
            head_dim=16,
            state_size=8,
            n_groups=2,
            **_ENDS,
        )
    ),
    "qwen3_next": lambda: transformers.Qwen3NextForCausalLM(
        transformers.Qwen3NextConfig(
            **_GROUPED,
            **_LINEAR,
            head_dim=8,
            num_experts=0,
            mlp_only_layers=[0, 1],
            layer_types=["linear_attention", "full_attention"],
        )
    ),
    "olmo_hybrid": lambda: transformers.OlmoHybridForCausalLM(
        transformers.OlmoHybridConfig(**_GROUPED, **_LINEAR, **_ENDS, layer_types=["linear_attention", "full_attention"])
    ),
    "falcon_h1": lambda: transformers.FalconH1ForCausalLM(
        transformers.FalconH1Config(**_GROUPED, **_SCANS, **_ENDS, head_dim=8, mamba_d_ssm=64)
    ),
    "lfm2": lambda: transformers.Lfm2ForCausalLM(
        transformers.Lfm2Config(**_GROUPED, **_ENDS, layer_types=["conv", "full_attention"])
    ),
}
"""Models with layers that keep the state of a recurrence or of a convolution."""
WHOLE: Mapping[str, Callable[[], nn.Module]] = {
    "openai_gpt": lambda: transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=MAX_LENGTH)
    ),
    "minimax": lambda: transformers.MiniMaxForCausalLM(
        transformers.MiniMaxConfig(**_GROUPED, head_dim=8, num_local_experts=2, block_size=8)
    ),
}
"""Models without a cache, or with one of their own: all tokens are computed at every call."""
OTHERS: Mapping[str, Callable[[], nn.Module]] = {
    **WHOLE,
    "deepseek_v32": lambda: transformers.DeepseekV32ForCausalLM(
        transformers.DeepseekV32Config(
            **_WIDE,
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            index_topk=8,
            index_head_dim=16,
            index_n_heads=16,
            mlp_layer_types=["dense", "sparse"],
        )
    ),
}
"""Models whose layers, or whose state, are of a form of their own."""
ROTARY = {"llama", "gemma3", "gemma2", "qwen2", "qwen3", "mistral", "phi", "gpt_neox"}
GATED = ROTARY - {"phi", "gpt_neox"}
WINDOWED = {"gemma3", "gemma2", "mistral"}


def decoder(name: str) -> transformers.PreTrainedModel:
    """One of DECODERS, RECURRENT or OTHERS in evaluation mode, with weights so large that its texts do not repeat one token."""
    model = seeded({**DECODERS, **RECURRENT, **OTHERS}[name])
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    return model.eval()


def prompt(rows: int = 1, length: int = 7, padding: int = 0) -> dict[str, torch.Tensor]:
    """Token ids and mask, [rows, length]; the first row begins with so much padding."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}
