"""The layers of an optimized decoder in the form that llama.cpp reads: all weights there, and one size or a size per layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lissom.errors import UnsupportedError
from lissom.export.gguf.families import FULL_HEADS, Family, Sizes, head_dim_of
from lissom.export.gguf.projections import DOWN, GATE, KEY, OUTPUT, QUERY, UP, VALUE, parameters_of, separated
from lissom.export.gguf.rope import rotary_fraction
from lissom.export.gguf.weights import Weight, padded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LAYER = "model.layers.{}."
_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"
_FEWEST = 32
"""The neurons of a feed-forward of zeros: a whole block of every type."""


@dataclass(frozen=True)
class Layers:
    """A decoder's weights by the names of transformers.

    Attributes:
        sizes: what llama.cpp is told.
        architecture: its graph.
    """

    weights: Mapping[str, Weight]
    sizes: Sizes
    architecture: str


def complete(
    weights: Mapping[str, Weight], model: PreTrainedModel, config: PretrainedConfig, family: Family, old: Mapping[str, str]
) -> dict[str, Weight]:
    """All weights of the model by the names of Llama. A branch that was removed gets weights of zeros, in the smallest size.

    Args:
        weights: of the program, by the names of the model that it leaves.
        old: the original model's name of each.

    Raises:
        UnsupportedError: naming a weight that the program lacks.
    """
    with torch.device("meta"):
        made = separated(parameters_of(type(model)(copy.deepcopy(config))), family)
    shapes = {name: tuple(parameter.shape) for name, parameter in made.items()}
    completed, own = separated(weights, family), parameters_of(model, every_name=True)
    original = separated({new: own[name] for new, name in old.items() if name in own}, family)
    if config.tie_word_embeddings:
        table = completed.pop(_HEAD, None)
        if table is not None:
            completed.setdefault(_TABLE, table)
        shapes.pop(_HEAD, None)
    for index in range(_count_of(config)):
        layer, head_dim = LAYER.format(index), head_dim_of(config)
        branches = {(QUERY, KEY, VALUE, OUTPUT): head_dim, (GATE, UP, DOWN): _FEWEST}
        for parts, size in branches.items():
            present = tuple(part for part in parts if f"{layer}{part}.weight" in shapes)
            if any(f"{layer}{part}.weight" not in completed for part in present):
                zeros, bias = _zeros(layer, present, size, shapes), f"{layer}{present[-1]}.bias"
                # What is added for every input stays, where it has not become another constant.
                completed |= zeros | {name: completed[name] for name in (bias,) if name in completed}
    for name in shapes.keys() - completed.keys():
        # Norms of branches that were removed.
        if name.startswith(LAYER.partition("{")[0]) and name.endswith(("norm.weight", "norm.bias")):
            completed[name] = original[name]
    missing = min(shapes.keys() - completed.keys(), default=None)
    if missing is not None:
        raise UnsupportedError(f"the program of {type(model).__name__} has no weight for '{missing}', {list(shapes[missing])}")
    return {name: completed[name] for name in shapes}


def _count_of(config: Any) -> int:
    return config.num_hidden_layers


def _zeros(layer: str, parts: tuple[str, ...], size: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Weights of a branch that adds nothing; the last of its linear layers reads `size` features."""
    zeros: dict[str, torch.Tensor] = {}
    for part in parts:
        hidden = shapes[f"{layer}{parts[0]}.weight"][1]
        zeros[f"{layer}{part}.weight"] = torch.zeros((hidden, size) if part == parts[-1] else (size, hidden))
        if f"{layer}{part}.bias" in shapes:
            zeros[f"{layer}{part}.bias"] = torch.zeros(hidden if part == parts[-1] else size)
    return zeros


def sizes_of(weights: Mapping[str, Weight], config: PretrainedConfig) -> Sizes:
    """The heads and neurons of every layer. Raises UnsupportedError for parts of heads, or heads in uneven groups."""
    head_dim, by_layer = head_dim_of(config), list[tuple[int, int, int]]()
    for index in range(_count_of(config)):
        layer = LAYER.format(index)
        features = [weights[f"{layer}{part}.weight"].shape[0] for part in (QUERY, KEY, VALUE)]
        heads, groups = features[0] // head_dim, features[1] // head_dim
        if any(size % head_dim for size in features) or features[1] != features[2] or not groups or heads % groups:
            raise UnsupportedError(
                f"llama.cpp reads whole heads of {head_dim} features, as many for each key/value head, and layer {index} has "
                f"{features[0]}, {features[1]} and {features[2]} features in queries, keys and values; prune heads evenly"
            )
        by_layer.append((heads, groups, weights[f"{layer}{UP}.weight"].shape[0]))
    heads, groups, neurons = zip(*by_layer, strict=True)
    return Sizes(heads, groups, neurons)


def fit(weights: Mapping[str, Weight], sizes: Sizes, family: Family, config: PretrainedConfig) -> Layers:
    """The weights for a graph of llama.cpp: as they are, or padded with zeros to the widest layer.

    Raises:
        UnsupportedError: where padding would let query heads read other keys.
    """
    if not sizes.is_uniform and family.by_layer is not None and _reads_each_layer(family.by_layer, weights, config):
        return Layers(weights, sizes, family.by_layer)
    wide, fitted = sizes.widest(), dict(weights)
    architecture = _graph(family, wide, config)
    if architecture in FULL_HEADS:
        wide = _with_full_heads(wide, config)
    if wide == sizes:
        return Layers(weights, sizes, architecture)
    shared = {heads // groups for heads, groups in zip(sizes.heads, sizes.key_value_heads, strict=True) if heads > 1}
    if len(shared) > 1 or (shared and shared != {wide.heads[0] // wide.key_value_heads[0]}):
        raise UnsupportedError(
            f"the graph '{family.architecture}' of llama.cpp has one number of heads for all layers, and this program has "
            f"{', '.join(map(str, sorted(shared)))} query heads for each key/value head; prune heads with scope=layer"
        )
    head_dim = head_dim_of(config)
    for index in range(len(sizes.heads)):
        layer = LAYER.format(index)
        rows = {QUERY: wide.heads[0] * head_dim, UP: wide.neurons[0], GATE: wide.neurons[0]}
        rows |= dict.fromkeys((KEY, VALUE), wide.key_value_heads[0] * head_dim)
        for part, size in rows.items():
            weight, bias = f"{layer}{part}.weight", f"{layer}{part}.bias"
            if weight not in fitted:
                continue
            fitted[weight] = padded(fitted[weight], (size, fitted[weight].shape[1]))
            if bias in fitted:
                fitted[bias] = padded(fitted[bias], (size,))
        for part, size in ((OUTPUT, wide.heads[0] * head_dim), (DOWN, wide.neurons[0])):
            weight = f"{layer}{part}.weight"
            fitted[weight] = padded(fitted[weight], (fitted[weight].shape[0], size))
    return Layers(fitted, wide, architecture)


def _graph(family: Family, sizes: Sizes, config: Any) -> str:
    """The graph for layers of one width."""
    narrower = sizes.heads[0] * head_dim_of(config) != config.hidden_size
    # The graphs of Llama turn whole heads.
    if not narrower or family.other_heads is None or rotary_fraction(config) != 1.0:
        return family.architecture
    return family.other_heads


def _with_full_heads(sizes: Sizes, config: Any) -> Sizes:
    """As many heads as fill the residual stream, in the same groups. Raises UnsupportedError if these do not fill it."""
    heads, groups = sizes.heads[0], sizes.key_value_heads[0]
    full = config.hidden_size // head_dim_of(config)
    if full * groups % heads:
        raise UnsupportedError(
            f"llama.cpp reads heads as wide as the residual stream, which are {full}; groups of {heads // groups} query heads "
            f"for each key/value head do not divide them"
        )
    count = len(sizes.heads)
    return Sizes((full,) * count, (full * groups // heads,) * count, sizes.neurons)


def _reads_each_layer(architecture: str, weights: Mapping[str, Weight], config: PretrainedConfig) -> bool:
    """True if the graph for several widths has room for these weights: `deci` has no biases, `openelm` ties its LM head."""
    if architecture == "openelm":
        return bool(config.tie_word_embeddings)
    return not any(name.endswith(".bias") for name in weights) and rotary_fraction(config) == 1.0
