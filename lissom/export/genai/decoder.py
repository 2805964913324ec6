"""A program without a KV cache as the ONNX decoder that ONNX Runtime GenAI runs: inputs for the cache, and positions.

    logits, present = decoder(input_ids, attention_mask, position_ids, past)

input_ids, position_ids: [1, tokens], the new tokens of a text. attention_mask: [1, all tokens so far], ones. past: keys and
values of each layer, [1, key heads, tokens or more, head_dim], and present those after the call; they may be one buffer.

Each causal attention becomes `com.microsoft.GroupQueryAttention`, which appends the new keys and values to the cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from lissom.backends.onnx.attention import CONTRIB, skip_joins
from lissom.backends.onnx.integer_matmul import expand_integers
from lissom.backends.onnx.quantized_layers import quantized_layers
from lissom.backends.onnx.rewriting import Writer, fixed_size, nodes_of, shape_of
from lissom.backends.onnx.sparse_attention import Sparse
from lissom.backends.onnx.translation import DOMAIN, SPARSE_ATTENTION
from lissom.backends.onnx.variants import RMS_NORMS, ROTARY, write_variant
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.errors import UnsupportedError
from lissom.export.causal_lm.attention import window_of
from lissom.export.causal_lm.graph import CHOICES, TOTAL, add_input, causal, export, only_logits, take_mask, take_positions
from lissom.export.causal_lm.names import INPUT_IDS, PAST, POSITION_IDS, PRESENT, Layer
from lissom.export.genai.families import RUNTIME
from lissom.ops.formats import FORMATS
from lissom.ops.quantization import dequantize

_TOKENS, _PAST_TOKENS = "sequence_length", "past_sequence_length"


@dataclass(frozen=True)
class OnnxDecoder:
    """The decoder.

    Attributes:
        model: in ONNX.
        layers: with attention, in order.
        products: the number of matrix products of each kind.
        vocabulary: the number of logits of a token.
    """

    model: ir.Model
    layers: Sequence[Layer]
    products: Counter[str]
    vocabulary: int


def decoder_of(program: Program, example: Sample) -> OnnxDecoder:
    """The program as a decoder with a KV cache. Raises UnsupportedError for one that has none there."""
    found = causal(program, example, RUNTIME)
    _check_types(found)
    exported = export(found, example, RUNTIME)
    products = _products(exported)
    mask = take_mask(exported)
    take_positions(exported)
    layers = _add_cache(exported, mask)
    logits = only_logits(exported, RUNTIME)
    _name_sizes(exported)
    # ONNX Runtime would fuse int8 layers that are left in floating point to products that round activations.
    expand_integers(exported, small=True)
    model, _ = write_variant(exported, [RMS_NORMS, ROTARY])
    return OnnxDecoder(model, layers, products, fixed_size(logits, -1))


def _check_types(program: Program) -> None:
    """Refuse what ONNX Runtime has no kernels for on a CPU. Raises UnsupportedError."""
    if any(nodes.is_tensor(n) and n.op != "output" and nodes.tensor_type(n).dtype == torch.bfloat16 for n in program):
        raise UnsupportedError(
            f"ONNX Runtime lacks kernels of bfloat16 on a CPU, and {program.name} computes in it; convert the model to float32"
        )
    odd = next((node for node in program.nodes(dequantize) if not _is_stored(node)), None)
    if odd is not None:
        raise UnsupportedError(
            f"'{nodes.operand(odd).target}' of {program.name} is in {odd.kwargs['format']}, and MatMulNBits of ONNX Runtime "
            f"takes integers of four and eight bits; choose {CHOICES}"
        )


def _is_stored(node: torch.fx.Node) -> bool:
    """True for a dequantized weight in integers of four or eight bits."""
    form = FORMATS[str(node.kwargs["format"])]
    return form.is_integer and form.bits in (4, 8)


def _products(model: ir.Model) -> Counter[str]:
    """The number of quantized products of each kind. Raises UnsupportedError for one without a kernel."""
    products: Counter[str] = Counter()
    for layer in quantized_layers(model):
        if layer.obstacle is not None:
            raise UnsupportedError(
                f"the quantized layer '{layer.module}' has no kernel in ONNX Runtime: {layer.obstacle}; choose {CHOICES}"
            )
        assert layer.stored is not None
        products[f"int{layer.stored.form.bits} in blocks of {layer.block}"] += 1
    return products


def _add_cache(model: ir.Model, mask: ir.Value) -> list[Layer]:
    """Replace each attention with one that keeps its keys and values; returns their sizes."""
    attentions = nodes_of(model, DOMAIN, SPARSE_ATTENTION)
    write = Writer(model)
    number = int(ir.DataType.INT32)
    last = write.call("Cast", write.call("Sub", write.call("ReduceSum", mask, 1, keepdims=0), 1), to=number)
    total = write.call("Cast", write.call("Squeeze", write.call("Shape", mask, start=1, end=2)), to=number)
    model.graph.insert_before(attentions[0], write.nodes)
    model.opset_imports[CONTRIB] = 1
    return [_with_cache(model, node, index, (last, total)) for index, node in enumerate(attentions)]


def _with_cache(model: ir.Model, node: ir.Node, index: int, lengths: Sequence[ir.Value]) -> Layer:
    site = Sparse.of_pattern(model, node)
    heads, key_heads, width = fixed_size(site.q, 1), fixed_size(site.k, 1), fixed_size(site.k, 3)
    window, dtype = window_of(site.pattern), site.q.dtype
    assert dtype is not None
    past = [add_input(model, name.format(index), dtype, 1, key_heads, _PAST_TOKENS, width) for name in PAST]
    inputs = [*map(site.joined, (site.q, site.k, site.v)), *past, *lengths]
    options: dict[str, float] = {"num_heads": heads, "kv_num_heads": key_heads, "scale": site.scale}
    options |= {"local_window_size": window} if window is not None else {}
    options |= {"softcap": site.softcap} if site.softcap else {}
    joined, *present = site.write.op_multi_out("GroupQueryAttention", inputs, options, domain=CONTRIB, num_outputs=3)
    for value, name in zip(present, PRESENT, strict=True):
        value.name, value.type = name.format(index), ir.TensorType(dtype)
        value.shape = ir.Shape([1, key_heads, TOTAL, width])
    batch, _, tokens, _ = shape_of(site.q)
    joined.type, joined.shape = site.q.type, ir.Shape([batch, tokens, heads * width])
    apart = site.write.shaped(joined, 0, 0, heads, width)
    skip_joins(site.result, joined)
    site.write.replace(node, site.write.call("Transpose", apart, perm=(0, 2, 1, 3)))
    model.graph.outputs.extend(present)
    return Layer(heads, key_heads, width, window)


def _name_sizes(model: ir.Model) -> None:
    """Name the sizes of inputs and outputs as ONNX Runtime GenAI does; there is one text."""
    for value in model.graph.inputs:
        if value.name in (INPUT_IDS, POSITION_IDS):
            value.shape = ir.Shape([1, _TOKENS])
    logits = model.graph.outputs[0]
    logits.shape = ir.Shape([1, _TOKENS, fixed_size(logits, -1)])
