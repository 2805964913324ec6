"""The weights of a decoder by one set of names, those of Llama, whatever its family fuses or transposes.

GPT-2   c_attn [hidden, 3 · hidden]      q_proj, k_proj and v_proj, each [out, in]
Phi-3   qkv_proj, gate_up_proj           q_proj, k_proj and v_proj; gate_proj and up_proj
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lissom.export.gguf.families import Family
from lissom.export.gguf.weights import Weight, rows_of, value_of

QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{name}_proj" for name in ("q", "k", "v", "o"))
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
FUSED: Mapping[str, tuple[str, ...]] = {"self_attn.qkv_proj": (QUERY, KEY, VALUE), "mlp.gate_up_proj": (GATE, UP)}
"""The projections whose rows the models have in one weight, in this order."""


def transposed_weights(model: nn.Module) -> frozenset[str]:
    """The weights that the model has as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return frozenset(f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D))


def parameters_of(model: nn.Module, *, every_name: bool = False) -> dict[str, torch.Tensor]:
    """The model's parameters, all matrices [out, in].

    Args:
        every_name: weights that are tied come by all their names.
    """
    transposed = transposed_weights(model)
    named = model.named_parameters(remove_duplicate=not every_name)
    return {name: weight.detach().T if name in transposed else weight.detach() for name, weight in named}


def separated(weights: Mapping[str, Weight], family: Family) -> dict[str, Weight]:
    """The weights by the names of Llama, with fused projections in parts.

    Args:
        weights: by the model's names, matrices [out, in]. Of an attention without an output projection, they are left out.
    """
    renamed = {family.renamed(name): weight for name, weight in weights.items()}
    found: dict[str, Weight] = {}
    for name, weight in renamed.items():
        fused = next((fused for fused in FUSED if f".{fused}." in name), None)
        if fused is None:
            found[name] = weight
            continue
        before, _, leaf = name.partition(fused)
        start = 0
        for part, size in zip(FUSED[fused], _sizes(fused, before, weight, renamed), strict=False):
            found[f"{before}{part}{leaf}"] = rows_of(weight, slice(start, start + size))
            start += size
    return found


def _sizes(fused: str, layer: str, weight: Weight, weights: Mapping[str, Weight]) -> tuple[int, ...]:
    """The rows of each part of a fused weight; none where the layer has no output projection."""
    rows = int(weight.shape[0])
    if FUSED[fused] == (GATE, UP):
        return rows // 2, rows - rows // 2
    output = weights.get(f"{layer}{OUTPUT}.weight")
    if output is None:
        return ()
    # As many values come out of an attention as it has queries.
    queries = min(int(output.shape[1]), rows)
    return queries, (rows - queries) // 2, rows - queries - (rows - queries) // 2


def assign(model: nn.Module, weights: Mapping[str, Weight], family: Family) -> None:
    """Set the model's parameters to weights by the names of Llama, of any sizes."""
    joined = {name: value_of(weight) for name, weight in weights.items()}
    for fused, parts in FUSED.items() if family.fuses else ():
        first = parts[0]
        for name in [name for name in joined if f".{first}." in name]:
            joined[name.replace(first, fused)] = torch.cat([joined.pop(name.replace(first, part)) for part in parts])
    transposed = transposed_weights(model)
    for name, value in joined.items():
        own = family.own_name(name)
        path, _, leaf = own.rpartition(".")
        module: Any = model.get_submodule(path)
        setattr(module, leaf, nn.Parameter(value.T if own in transposed else value, requires_grad=False))
        if own in transposed:
            # A Conv1D reads its width from here.
            module.nf = value.shape[0]
