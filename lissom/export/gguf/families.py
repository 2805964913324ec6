"""The model families that llama.cpp has a graph for: names of weights, the fields that its graph fixes, and the metadata.

llama.cpp has one graph per architecture. Most of them read one width for all layers; `deci` (a Llama) and `openelm` (a Qwen3
with tied embeddings) read the number of heads and neurons of each layer. https://github.com/ggml-org/llama.cpp, src/models
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lissom.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """The computation of a family of models in llama.cpp.

    Attributes:
        architecture: for layers of one width.
        by_layer: for layers of several widths; None where llama.cpp has none.
        other_heads: for heads that are together narrower than the residual stream, where `architecture` has no room for them.
        fields: the values of the configuration that its graph computes with.
        norm_offset: what is added to the weights of norms.
    """

    architecture: str
    by_layer: str | None = None
    other_heads: str | None = None
    fields: Mapping[str, Sequence[object]] = field(default_factory=dict[str, Sequence[object]])
    norm_offset: float = 0.0


INTERLEAVED = ("llama", "deci")
"""The graphs in which pairs of rotary features are neighbours; in transformers they are half a head apart."""
_SILU = {"hidden_act": ("silu",)}
FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", "deci", fields=_SILU),
    "mistral": Family("llama", "deci", fields={**_SILU, "sliding_window": (None,)}),
    "qwen2": Family("qwen2", None, "llama", {**_SILU, "use_sliding_window": (False,)}),
    "qwen3": Family("qwen3", "openelm", fields={**_SILU, "use_sliding_window": (False,), "attention_bias": (False,)}),
    "gemma3_text": Family(
        "gemma3",
        fields={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (None, False),
            "attention_bias": (False,),
        },
        norm_offset=1.0,
    ),
}
"""By the model type of transformers."""


@dataclass(frozen=True)
class Sizes:
    """The attention heads, key/value heads and feed-forward neurons of every layer."""

    heads: tuple[int, ...]
    key_value_heads: tuple[int, ...]
    neurons: tuple[int, ...]

    @property
    def is_uniform(self) -> bool:
        return all(len(set(sizes)) == 1 for sizes in (self.heads, self.key_value_heads, self.neurons))

    def widest(self) -> Sizes:
        """The largest size of all layers, for every layer."""
        count = len(self.heads)
        return Sizes(*((max(sizes),) * count for sizes in (self.heads, self.key_value_heads, self.neurons)))


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model. Raises UnsupportedError for one that is not listed, or whose graph computes something else."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedError(
            f"GGUF files are written for models of type {', '.join(FAMILIES)}, and this one is of type '{config.model_type}'"
        )
    for name, allowed in family.fields.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise UnsupportedError(
                f"the graph '{family.architecture}' of llama.cpp has {name}={allowed[0]!r}, and this model {value!r:.80}"
            )
    return family


def head_dim_of(config: Any) -> int:
    """The features of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def describe(writer: Any, config: Any, sizes: Sizes) -> None:
    """Write the metadata of the configuration.

    Args:
        writer: a GGUFWriter.

    Raises:
        UnsupportedError: as `rope_of`.
    """
    head_dim = head_dim_of(config)
    writer.add_block_count(len(sizes.heads))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    named = {
        writer.add_head_count: sizes.heads,
        writer.add_head_count_kv: sizes.key_value_heads,
        writer.add_feed_forward_length: sizes.neurons,
    }
    for add, counts in named.items():
        add(counts[0] if sizes.is_uniform else list(counts))
    if config.model_type == "gemma3_text":
        _describe_gemma(writer, config, head_dim)
    _describe_rope(writer, rope_of(config))


def rope_of(config: Any) -> Mapping[str, Any]:
    """The parameters of the rotary embeddings; of layers with full attention where there are two kinds.

    Raises:
        UnsupportedError: for a kind that is not written here.
    """
    parameters = config.rope_parameters
    parameters = parameters.get("full_attention", parameters)
    kind, turned = parameters.get("rope_type", "default"), parameters.get("partial_rotary_factor") or 1.0
    if kind not in ("default", "linear", "llama3") or turned != 1.0:
        raise UnsupportedError(
            f"GGUF files are written for rotary embeddings of type default, linear and llama3 over whole heads, and this model "
            f"has type '{kind}' over {turned:.0%} of a head"
        )
    return parameters


def rope_factors(config: Any, model: Any) -> torch.Tensor | None:
    """Divisors of the heads' frequencies in llama.cpp, [head_dim / 2]; None if these are plain or scaled linearly."""
    rope = rope_of(config)
    if rope.get("rope_type", "default") != "llama3":
        return None
    frequencies = model.model.rotary_emb.inv_freq.cpu()
    steps = torch.arange(0, 2 * len(frequencies), 2, dtype=torch.float32) / (2 * len(frequencies))
    return rope["rope_theta"] ** -steps / frequencies.float()


def _describe_rope(writer: Any, rope: Mapping[str, Any]) -> None:
    # gguf is an optional dependency.
    from gguf import RopeScalingType

    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _describe_gemma(writer: Any, config: Any, head_dim: int) -> None:
    scaled_by = config.hidden_size / config.num_attention_heads if config.num_hidden_layers == 62 else head_dim
    if config.query_pre_attn_scalar != scaled_by:
        raise UnsupportedError(
            f"the graph 'gemma3' of llama.cpp scales queries by 1/√{scaled_by:g}, and this model by "
            f"1/√{config.query_pre_attn_scalar:g}"
        )
    kinds, local = list(config.layer_types), config.rope_parameters["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise UnsupportedError("the graph 'gemma3' of llama.cpp has plain rotary embeddings in layers with a sliding window")
    period = _period(kinds)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(period)
    writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    if config.final_logit_softcapping is not None:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _period(kinds: Sequence[str]) -> int:
    """Every how many layers one has full attention. Raises UnsupportedError where they are not evenly spaced."""
    full = [kind == "full_attention" for kind in kinds]
    # A period of more layers than there are has none with full attention.
    for period in range(1, len(full) + 2):
        if full == [index % period == period - 1 for index in range(len(full))]:
            return period
    places = ", ".join(str(index) for index, whole in enumerate(full) if whole)
    raise UnsupportedError(
        f"the graph 'gemma3' of llama.cpp has full attention in every n-th layer, and this program in layers {places} of "
        f"{len(full)}; prune layers so that one of each n consecutive ones stays full, the last of them"
    )
