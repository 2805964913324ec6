"""The model families that llama.cpp has a graph for: names of weights, the fields that its graph fixes, and the metadata.

llama.cpp has one graph per architecture. Most of them read one width for all layers; `deci` (a Llama) and `openelm` (a Qwen3
with tied embeddings) read the number of heads and neurons of each layer. https://github.com/ggml-org/llama.cpp, src/models
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lissom.errors import UnsupportedError
from lissom.export.gguf.rope import describe_rope, rotary_fraction

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
        names: parts of the names of its weights, and those of Llama, replaced one after the other.
        fuses: its models have q, k and v in one weight, and gate and up.
    """

    architecture: str
    by_layer: str | None = None
    other_heads: str | None = None
    fields: Mapping[str, Sequence[object]] = field(default_factory=dict[str, Sequence[object]])
    norm_offset: float = 0.0
    names: Sequence[tuple[str, str]] = ()
    fuses: bool = False

    def renamed(self, name: str) -> str:
        """Llama's name of a weight of a model of this family."""
        for own, llama in self.names:
            name = name.replace(own, llama)
        return name

    def own_name(self, name: str) -> str:
        """The model's name of a weight that `renamed` gave Llama's name."""
        for own, llama in reversed(self.names):
            name = name.replace(llama, own)
        return name


INTERLEAVED = ("llama", "deci")
"""The graphs in which pairs of rotary features are neighbours; in transformers they are half a head apart."""
FULL_HEADS = ("phi3", "gpt2")
"""The graphs whose heads are together as wide as the residual stream."""
_GPT2_NAMES = (
    ("transformer.h.", "model.layers."),
    ("transformer.wte.", "model.embed_tokens."),
    ("transformer.ln_f.", "model.norm."),
    (".ln_1.", ".input_layernorm."),
    (".ln_2.", ".post_attention_layernorm."),
    (".attn.", ".self_attn."),
    (".c_attn.", ".qkv_proj."),
    (".self_attn.c_proj.", ".self_attn.o_proj."),
    (".mlp.c_fc.", ".mlp.up_proj."),
    (".mlp.c_proj.", ".mlp.down_proj."),
)
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
    "phi3": Family("phi3", "deci", "llama", _SILU, fuses=True),
    "gpt2": Family(
        "gpt2",
        fields={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        names=_GPT2_NAMES,
        fuses=True,
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
    writer.add_context_length(_context_of(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    named = {
        writer.add_head_count: sizes.heads,
        writer.add_head_count_kv: sizes.key_value_heads,
        writer.add_feed_forward_length: sizes.neurons,
    }
    for add, counts in named.items():
        add(counts[0] if sizes.is_uniform else list(counts))
    if config.model_type == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(head_dim * rotary_fraction(config)))
    if writer.arch == "phi3":
        # llama.cpp refused Phi-3 without it; 0 is no window.
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "gemma3_text":
        _describe_gemma(writer, config, head_dim)
    describe_rope(writer, config)


def _context_of(config: Any) -> int:
    """The tokens of the longest text; the graph 'phi3' has no sliding window, so its texts end where the window does."""
    window = getattr(config, "sliding_window", None) if config.model_type == "phi3" else None
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


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
