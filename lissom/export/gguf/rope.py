"""Rotary embeddings in GGUF files: the kinds that are written, and the tensors with their frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lissom.errors import UnsupportedError

LONG = "longrope"
"""Two sets of frequencies: one for short texts, one for texts longer than the model was first trained with."""


def rope_of(config: Any) -> Mapping[str, Any]:
    """The parameters of the rotary embeddings, of layers with full attention where there are two kinds; none without any.

    Raises:
        UnsupportedError: for a kind that is not written here.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    kind, turned = parameters.get("rope_type", "default"), parameters.get("partial_rotary_factor") or 1.0
    kinds = ("default", LONG) if config.model_type == "phi3" else ("default", "linear", "llama3")
    if kind not in kinds or (turned != 1.0 and config.model_type != "phi3"):
        where = "" if config.model_type == "phi3" else " over whole heads"
        raise UnsupportedError(
            f"GGUF files of models of type '{config.model_type}' are written for rotary embeddings of type "
            f"{', '.join(kinds)}{where}, and this model has type '{kind}' over {turned:.0%} of a head"
        )
    return parameters


def rotary_fraction(config: Any) -> float:
    """The fraction of a head's features that rotary embeddings turn."""
    return float(rope_of(config).get("partial_rotary_factor") or 1.0)


def rope_factors(config: Any, model: Any) -> dict[str, torch.Tensor]:
    """Divisors of the heads' frequencies, [rotary features / 2], by the names of tensors; none for plain and linear kinds."""
    rope = rope_of(config)
    if rope.get("rope_type") == LONG:
        lengths = {"long": rope["long_factor"], "short": rope["short_factor"]}
        return {f"rope_factors_{name}.weight": torch.tensor(values, dtype=torch.float32) for name, values in lengths.items()}
    if rope.get("rope_type") != "llama3":
        return {}
    frequencies = model.model.rotary_emb.inv_freq.cpu()
    steps = torch.arange(0, 2 * len(frequencies), 2, dtype=torch.float32) / (2 * len(frequencies))
    return {"rope_freqs.weight": rope["rope_theta"] ** -steps / frequencies.float()}


def describe_rope(writer: Any, config: Any) -> None:
    """Write the metadata of the rotary embeddings.

    Args:
        writer: a GGUFWriter.
    """
    # gguf is an optional dependency.
    from gguf import RopeScalingType

    rope = rope_of(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope.get("rope_type") == LONG:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        _, factor = ROPE_INIT_FUNCTIONS[LONG](config)
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(float(factor))
