"""Tests of lissom.frontends.checkpoints.quantized with models whose weights are stacked or transposed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import lissom
from lissom.frontends.models.huggingface import load
from lissom.ops.quantization import dequantize
from tests.support.quantized_checkpoints import change_config, gptq_parts, neighbours, rounded


def test_experts_stay_in_floating_point(tmp_path: Path) -> None:
    """transformers stacks the weights of experts, and a stack of integers is none of the file."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2}
    config = transformers.Qwen3MoeConfig(vocab_size=80, num_hidden_layers=1, **sizes, **heads)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    plain, quantized = load_file(tmp_path / "model.safetensors"), dict[str, torch.Tensor]()
    for name, weight in plain.items():
        if "_proj" not in name:
            quantized[name] = weight
            continue
        stored = rounded(weight.numpy(), 4, neighbours(weight.shape[1], 32), symmetric=True)
        quantized |= {name.removesuffix("weight") + leaf: part for leaf, part in gptq_parts(stored, 4).items()}
        plain[name] = torch.from_numpy(stored.values()).float()
    save_file(plain, tmp_path / "model.safetensors", metadata={"format": "pt"})
    wanted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    save_file(quantized, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path, quant_method="gptq", bits=4, group_size=32, desc_act=False, sym=True)
    checkpoint, ids = load(str(tmp_path), with_inputs=False), torch.arange(3, 15)[None]
    assert checkpoint.notes == (
        "12 quantized weights, 'model.layers.0.mlp.experts.0.down_proj.weight' first, are in floating point: the model joins "
        "or changes them",
        "the file stores 4 weights quantized (4 in int4 in groups of 32); use-stored-weights reads them as they are",
    )
    with torch.no_grad():
        assert torch.equal(checkpoint.model(ids, use_cache=False).logits, wanted(ids, use_cache=False).logits)


def test_transposed_layers_of_gpt2(tmp_path: Path) -> None:
    """Conv1D holds [in, out], and GPTQ stores its layers like any other."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32, "vocab_size": 80}
    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends)).eval()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in [name for name in state if ".c_" in name and name.endswith("weight")]:
        weight = state.pop(name).T.contiguous().numpy()
        stored = rounded(weight, 4, neighbours(weight.shape[1], 32), symmetric=True)
        state |= {name.removesuffix("weight") + leaf: part for leaf, part in gptq_parts(stored, 4).items()}
        with torch.no_grad():
            model.transformer.get_parameter(name.removeprefix("transformer.")).copy_(torch.from_numpy(stored.values()).T)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path, quant_method="gptq", bits=4, group_size=32, desc_act=False, sym=True)
    inputs = {"input_ids": torch.arange(3, 15)[None], "use_cache": False}
    found: Any = load(str(tmp_path), with_inputs=False).model
    program = lissom.optimize(found, inputs, passes="use-stored-weights").program
    assert len(program.nodes(dequantize)) == 4
    with torch.no_grad():
        wanted = model(**inputs).logits
        assert torch.equal(found(**inputs).logits, wanted)
    # Sums of float32 in another order: 24 bits, logits up to 8.
    torch.testing.assert_close(program(**inputs)[0], wanted, rtol=1e-4, atol=1e-4)
