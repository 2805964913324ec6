"""The model of transformers with the weights and sizes that a file gets: what the file computes, in PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.verify.divergence import tolerance_of
from lissom.errors import UnsupportedError
from lissom.export.checkpoint import error_of
from lissom.export.gguf.families import Family, Sizes
from lissom.export.gguf.layers import LAYER
from lissom.export.gguf.projections import assign
from lissom.export.gguf.weights import Weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def rebuilt(
    model: PreTrainedModel,
    config: PretrainedConfig,
    family: Family,
    weights: Mapping[str, Weight],
    sizes: Sizes,
    old: Mapping[str, str],
) -> nn.Module:
    """The model's layers with these weights and sizes.

    Args:
        weights: all of them, by the names of Llama.
        old: the original model's name of each weight.
    """
    with torch.device("meta"):
        made: Any = type(model)(copy.deepcopy(config)).eval()
    assign(made, weights, family)
    if config.tie_word_embeddings:
        made.lm_head.weight = made.get_input_embeddings().weight
    buffers = dict(model.named_buffers())
    for name, _ in list(made.named_buffers()):
        path, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(path), leaf, buffers[old.get(name, name)])
    for index, (heads, groups) in enumerate(zip(sizes.heads, sizes.key_value_heads, strict=True)):
        _set_heads(made.get_submodule(family.own_name(f"{LAYER.format(index)}self_attn.").removesuffix(".")), heads, groups)
    return made


def confirm(program: Program, made: nn.Module, example: Sample) -> None:
    """Compare the program with the rebuilt model. Raises UnsupportedError if they differ."""
    error = error_of(made, program, example)
    if not error <= tolerance_of(program):
        raise UnsupportedError(
            f"no GGUF file holds this program: the layers of {type(made).__name__} with its weights differ by {error:.2g} "
            f"relative, allowed {tolerance_of(program):.2g}; a file holds weights, also in int8 and int4, and no quantized "
            f"activations, low-rank factors or changed operators"
        )


def _set_heads(attention: Any, heads: int, groups: int) -> None:
    """Give an attention of transformers another number of heads and key/value heads."""
    attention.num_key_value_groups = heads // groups
    if hasattr(attention, "qkv_proj"):
        attention.config = copy.deepcopy(attention.config)
        attention.config.num_attention_heads, attention.num_key_value_heads = heads, groups
    if hasattr(attention, "c_attn"):
        attention.split_size = [count * attention.head_dim for count in (heads, groups, groups)]
