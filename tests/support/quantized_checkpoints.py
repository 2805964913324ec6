"""Checkpoints of small models, packed for tests as GPTQ and AWQ define it: each word is a sum of integers times powers of 2."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column of eight that each place of a word of AWQ holds."""
HIDDEN, FEED, VOCABULARY = 64, 96, 80


def small_config(
    kind: str = "llama", *, tied: bool = False, hidden: int = HIDDEN, feed: int = FEED, vocabulary: int = VOCABULARY
) -> Any:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": feed, "num_hidden_layers": 2, "vocab_size": vocabulary}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16}
    kinds = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}
    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}
    return kinds[kind](**sizes, **heads, **ends, tie_word_embeddings=tied, initializer_range=0.2)


def small_model(config: Any, seed: int = 0) -> Any:
    import transformers

    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()


@dataclass(frozen=True)
class Integers:
    """A weight [out, in]: unsigned q, scales and zero points [out, groups], and the group of each input."""

    q: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    group_of: np.ndarray

    def values(self) -> np.ndarray:
        """The weight in float64."""
        shifted = self.q.astype(np.float64) - self.zero_point[:, self.group_of]
        return shifted * self.scale.astype(np.float64)[:, self.group_of]


def rounded(weight: np.ndarray, bits: int, group_of: np.ndarray, *, symmetric: bool) -> Integers:
    """A weight rounded to the nearest, by a loop over the groups."""
    groups = int(group_of.max()) + 1
    q = np.zeros(weight.shape, np.int64)
    scale, zero = np.zeros((len(weight), groups), np.float16), np.zeros((len(weight), groups), np.int64)
    largest = 2**bits - 1
    for group in range(groups):
        part = weight[:, group_of == group].astype(np.float64)
        if symmetric:
            step, middle = 2 * np.abs(part).max(1) / largest, np.full(len(part), (largest + 1) // 2)
        else:
            step = (part.max(1) - part.min(1)) / largest
            middle = np.clip(np.round(-part.min(1) / step), 1, largest)
        scale[:, group], zero[:, group] = step, middle
        places = np.round(part / scale[:, group, None].astype(np.float64)) + middle[:, None]
        q[:, group_of == group] = np.clip(places, 0, largest)
    return Integers(q, scale, zero, group_of)


def words(integers: np.ndarray, bits: int, places: tuple[int, ...] | None = None) -> torch.Tensor:
    """Words of 32 bits along the last dimension, the first integer lowest; `places`: the integer at each place of a word."""
    each = 32 // bits
    grouped = integers.reshape(*integers.shape[:-1], -1, each)
    packed = np.zeros(grouped.shape[:-1], np.uint64)
    for place in range(each):
        packed += grouped[..., place if places is None else places[place]].astype(np.uint64) << np.uint64(bits * place)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


def gptq_parts(stored: Integers, bits: int, *, v2: bool = False, with_order: bool = True) -> dict[str, torch.Tensor]:
    parts = {
        "qweight": words(stored.q, bits).T.contiguous(),
        "qzeros": words(stored.zero_point.T - (0 if v2 else 1), bits),
        "scales": torch.from_numpy(stored.scale.T.copy()),
    }
    return parts | ({"g_idx": torch.from_numpy(stored.group_of.astype(np.int32))} if with_order else {})


def awq_parts(stored: Integers) -> dict[str, torch.Tensor]:
    return {
        "qweight": words(stored.q.T, 4, AWQ_ORDER),
        "qzeros": words(stored.zero_point.T, 4, AWQ_ORDER),
        "scales": torch.from_numpy(stored.scale.T.copy()),
    }


def neighbours(columns: int, group: int) -> np.ndarray:
    return np.arange(columns) // (columns if group == -1 else group)


@dataclass(frozen=True)
class Written:
    """A checkpoint in a folder, its integers by layer, and the plain model with the dequantized weights in float32."""

    folder: Path
    layers: Mapping[str, Integers]
    model: Any


def write(
    folder: Path,
    method: str,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    config: Any = None,
    scattered: Any = None,
    **fields: Any,
) -> Written:
    """Write a small model whose linear layers but the LM head are quantized, as GPTQ or AWQ.

    scattered: gives the group of each of so many inputs; else groups are of neighbours.
    """
    model = small_model(config or small_config())
    layers: dict[str, Integers] = {}
    state: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Linear) or "lm_head" in name:
            state[name] = weight.clone()
            continue
        groups = (scattered or neighbours)(weight.shape[1], group)
        stored = layers[layer] = rounded(weight.numpy(), bits, groups, symmetric=symmetric)
        v2 = fields.get("checkpoint_format") == "gptq_v2"
        parts = awq_parts(stored) if method == "awq" else gptq_parts(stored, bits, v2=v2)
        state |= {f"{layer}.{leaf}": part for leaf, part in parts.items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    model = model.float()
    with torch.no_grad():
        for layer, stored in layers.items():
            model.get_submodule(layer).weight.copy_(torch.from_numpy(stored.values()))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    kind = {"version": "gemm", "zero_point": True} if method == "awq" else {"desc_act": scattered is not None, "sym": symmetric}
    change_config(folder, quant_method=method, bits=bits, group_size=group, **kind, **fields)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return Written(folder, layers, model)


def change_config(folder: Path, **fields: Any) -> None:
    """Set fields of the quantization configuration; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | fields
    config["quantization_config"] = {name: value for name, value in config["quantization_config"].items() if value is not None}
    file.write_text(json.dumps(config))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors by names with `__` for dots; None removes one."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        state.pop(name.replace("__", "."), None)
        if tensor is not None:
            state[name.replace("__", ".")] = tensor
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def write_compressed(
    folder: Path,
    groups: Mapping[str, Any],
    *,
    ignore: tuple[str, ...] = ("lm_head",),
    config: Any = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a small model as compressed-tensors does, with the package itself, rounded to the nearest.

    groups: for each group the targets, and the fields of its weights and activations.
    """
    parts_of: Any = importlib.import_module
    quantization, compressors = parts_of("compressed_tensors.quantization"), parts_of("compressed_tensors.compressors")
    calculate_qparams = parts_of("compressed_tensors.quantization.utils").calculate_qparams
    model = small_model(config or small_config()).to(dtype)
    scheme = quantization.QuantizationConfig.model_validate({"config_groups": dict(groups), "ignore": list(ignore)})
    quantization.apply_quantization_config(model, scheme, show_progress=False)
    for module in model.modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if args is None:
            continue
        weight, shape = module.weight.detach(), module.weight_scale.shape
        if args.strategy == "block":
            rows, columns = args.block_structure
            parts = weight.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2).flatten(2)
        else:
            parts = weight.reshape(*(shape if len(shape) == 2 else (1, 1)), -1)
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
        module.weight_scale.data = scale.reshape(shape)
        if getattr(module, "weight_zero_point", None) is not None:
            module.weight_zero_point.data = zero.reshape(shape)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder
