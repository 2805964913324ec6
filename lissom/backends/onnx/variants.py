"""Variants of an ONNX model; which of them ONNX Runtime is fastest with depends on the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import onnx_ir as ir

from lissom.backends.onnx.attention import expand_attention
from lissom.backends.onnx.cached_attention import fuse_cached_attention
from lissom.backends.onnx.export import tidy
from lissom.backends.onnx.integer_matmul import expand_integers
from lissom.backends.onnx.norms import keep_norms_apart, write_out_rms_norms
from lissom.backends.onnx.projections import merge_projections
from lissom.backends.onnx.quantization import expand_quantization
from lissom.backends.onnx.rotary import expand_rotary
from lissom.backends.onnx.sparse_attention import CPU_BYTES, expand_sparse
from lissom.backends.onnx.state import expand_index_copies
from lissom.backends.onnx.translation import DOMAIN

PAIRS = "pairs"
"""Block-sparse attention with a dense mask; otherwise by key blocks, where these have a rule."""
ATTENTION, CACHE, NORMS, ROTARY = "attention", "cache", "norms", "rotary"
RMS_NORMS, PROJECTIONS = "rms-norms", "projections"

CHOICES: Mapping[str, str] = {
    ATTENTION: "attention as one operator",
    CACHE: "attention over a KV cache and the copies into it as one operator",
    NORMS: "layer norms not fused with the residual adds before them",
    ROTARY: "rotary embedding as one operator",
    RMS_NORMS: "RMS norms decomposed, to be fused with the residual adds before them",
    PROJECTIONS: "projections of one input merged into one product",
}
"""Rewrites of a model in the order in which they are tried, in words."""


INTEGERS = "integers"
"""Quantized layers as integer kernels. It is not timed: quantization was asked for."""


def write_variant(
    exported: ir.Model,
    chosen: Collection[str] = (),
    *,
    accuracy_level: int = 0,
    chunk_bytes: int = CPU_BYTES,
    standard: bool = False,
) -> tuple[ir.Model, dict[str, int]]:
    """The exported model with the chosen rewrites, of CHOICES, INTEGERS and PAIRS, and how often each applied.

    Args:
        chunk_bytes: of keys and values that block-sparse attention gathers at a time.
        standard: integer kernels in standard operators.
    """
    model = exported.clone()
    gathered = expand_sparse(model, PAIRS not in chosen, chunk_bytes)
    places = {
        PAIRS: gathered,
        INTEGERS: expand_integers(model, accuracy_level, standard=standard) if INTEGERS in chosen else 0,
        CACHE: fuse_cached_attention(model) if CACHE in chosen else 0,
        ATTENTION: expand_attention(model, ATTENTION in chosen),
        ROTARY: expand_rotary(model, ROTARY in chosen),
        NORMS: keep_norms_apart(model) if NORMS in chosen else 0,
        RMS_NORMS: write_out_rms_norms(model) if RMS_NORMS in chosen else 0,
    }
    _expand_rest(model)
    if PROJECTIONS in chosen:
        # Common subexpressions are merged now.
        places[PROJECTIONS] = merge_projections(model)
        tidy(model)
    _separate_weights(model)
    return model, places


def write_check(exported: ir.Model, accuracy_level: int = 0) -> ir.Model:
    """The exported model, with the relative error of each integer kernel as a further output."""
    model = exported.clone()
    expand_sparse(model, gathered=False)
    expand_integers(model, accuracy_level, beside=True)
    expand_attention(model, fused=False)
    expand_rotary(model, fused=False)
    _expand_rest(model)
    _separate_weights(model)
    return model


def _expand_rest(model: ir.Model) -> None:
    """Replace the other nodes of our domain, and tidy up."""
    expand_index_copies(model)
    expand_quantization(model)
    model.opset_imports.pop(DOMAIN, None)
    tidy(model)


def _separate_weights(model: ir.Model) -> None:
    """Let every integer product read its weight under a name of its own; they share memory.

    Where products of uint8 with int8 may overflow, ONNX Runtime converts the weight to uint8 at each product that reads it, and
    fails at the second product of the same weight.
    """
    read: Counter[str] = Counter()
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMulIntegerToFloat" else None
        if weight is None or weight.name is None or weight.const_value is None:
            continue
        read[weight.name] += 1
        if read[weight.name] > 1:
            name = f"{weight.name}_of_{read[weight.name]}"
            copy = ir.Value(name=name, const_value=weight.const_value, shape=weight.shape, type=weight.type)
            model.graph.register_initializer(copy)
            node.replace_input_with(1, copy)
