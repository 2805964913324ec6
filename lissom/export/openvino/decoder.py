"""A program without a KV cache as OpenVINO's IR with the cache as its state, in the form that openvino-genai reads.

    logits = decoder(input_ids, attention_mask, position_ids, beam_idx)

input_ids, position_ids: [batch, tokens], the new tokens. attention_mask: [batch, all tokens so far], zero for padding.
beam_idx: [batch], the row of the previous call that each row continues. The keys and values of a layer are [batch, key heads,
tokens so far, head_dim], and none after `reset_state`.

The mask is computed from the number of tokens and from attention_mask. Attention is OpenVINO's `ScaledDotProductAttention`
where every layer is causal without a window. openvino-genai replaces that operator by paged attention, which ignores the mask
(OpenVINO 2026.4). Decoders with a sliding window or softcapping in a layer therefore have matrix products and a softmax in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import openvino
from openvino import opset13, passes

from lissom.backends.onnx.quantized_layers import quantized_layers
from lissom.backends.onnx.rewriting import Writer, fixed_size, nodes_of, shape_of
from lissom.backends.onnx.sparse_attention import Sparse
from lissom.backends.onnx.translation import ATTENTION, DOMAIN, SPARSE_ATTENTION
from lissom.backends.onnx.variants import RMS_NORMS, write_variant
from lissom.backends.openvino.conversion import quantized_layer, read_onnx, refused
from lissom.backends.openvino.integers import Quantized
from lissom.backends.openvino.network import GROUP_SIZE
from lissom.backends.openvino.softplus import write_out_softplus
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.export.causal_lm.attention import window_of
from lissom.export.causal_lm.graph import TOTAL, add_input, causal, export, only_logits, take_mask, take_positions
from lissom.export.causal_lm.names import ATTENTION_MASK, INPUT_IDS, LOGITS, PAST, POSITION_IDS, PRESENT, Layer, Runtime

BEAM_IDX = "beam_idx"
RUNTIME = Runtime("openvino-genai", "OpenVINO", "have a KV cache in OpenVINO")
CACHE_PRECISION = ("runtime_options", "KV_CACHE_PRECISION")
"""Where an IR says the precision of its KV cache; OpenVINO's own default is u8."""
_PAST_TOKENS = "past_sequence_length"


@dataclass(frozen=True)
class Decoder:
    """The decoder, as written.

    Attributes:
        layers: with attention, in order.
        quantized: its quantized layers.
        vocabulary: the number of logits of a token.
        texts: True if it reads several texts at a time.
    """

    layers: Sequence[Layer]
    quantized: Quantized
    vocabulary: int
    texts: bool


def write_decoder(program: Program, example: Sample, path: Path) -> Decoder:
    """Write a program as IR with a KV cache: `path`, an .xml, and its weights beside it, a .bin.

    Raises:
        UnsupportedError: for a program that cannot have a KV cache, or that OpenVINO cannot run.
    """
    exported = export(causal(program, example, RUNTIME), example, RUNTIME)
    batch = shape_of(next(value for value in exported.graph.inputs if value.name == INPUT_IDS))[0]
    mask = take_mask(exported, batch)
    texts = take_positions(exported, batch) and not isinstance(batch, int)
    layers = _add_cache(exported, mask, batch)
    vocabulary = _take_logits(exported)
    with refused(program):
        write_out_softplus(exported)
        found = quantized_layers(exported)
        model = write_variant(exported, [RMS_NORMS], standard=True)[0]
        quantized = Quantized([quantized_layer(model, layer, False) for layer in found], 0)
        converted = read_onnx(program, model)
        _read_attention(converted)
        _make_stateful(converted, len(layers), texts)
        converted.set_rt_info("0", list(GROUP_SIZE))
        converted.set_rt_info("f32", list(CACHE_PRECISION))
        openvino.save_model(converted, path, compress_to_fp16=False)
    return Decoder(layers, quantized, vocabulary, texts)


def _take_logits(model: ir.Model) -> int:
    """Return logits in float32, which openvino-genai reads, and no other outputs; the number of them."""
    logits = only_logits(model, RUNTIME)
    if logits.dtype != ir.DataType.FLOAT:
        write = Writer(model)
        logits.name = f"{LOGITS}_{logits.dtype}"
        cast = write.call("Cast", logits, to=int(ir.DataType.FLOAT))
        cast.name, cast.shape, cast.type = LOGITS, logits.shape, ir.TensorType(ir.DataType.FLOAT)
        model.graph.extend(write.nodes)
        model.graph.outputs[0] = cast
    return fixed_size(logits, -1)


def _add_cache(model: ir.Model, mask: ir.Value, batch: int | ir.SymbolicDim) -> list[Layer]:
    """Replace each attention with one over past and new keys and values; returns their sizes."""
    attentions = nodes_of(model, DOMAIN, SPARSE_ATTENTION)
    write = Writer(model)
    inputs = {value.name: value for value in model.graph.inputs}
    total, new = write.length(mask, 1), write.length(inputs[INPUT_IDS], 1)
    kept = write.call("Cast", mask, to=int(ir.DataType.BOOL))
    kept = write.call("Unsqueeze", kept, write.integers(1, 2))
    i = write.call("Unsqueeze", write.counted(write.call("Sub", total, new), total), 1)
    j = write.call("Unsqueeze", write.counted(0, total), 0)
    visible: dict[int | None, ir.Value] = {}
    sites = [Sparse.of_pattern(model, node) for node in attentions]
    fused = not any(site.softcap for site in sites) and all(window_of(site.pattern) is None for site in sites)
    for window in dict.fromkeys(window_of(site.pattern) for site in sites):
        seen = write.call("LessOrEqual", j, i)
        if window is not None:
            seen = write.every(seen, write.call("Greater", j, write.call("Sub", i, window)))
        visible[window] = write.every(kept, seen)
        visible[window].type = ir.TensorType(ir.DataType.BOOL)
        visible[window].shape = ir.Shape([batch, 1, *shape_of(inputs[INPUT_IDS])[1:], TOTAL])
    model.graph.insert_before(attentions[0], write.nodes)
    layers: list[Layer] = []
    for index, (node, site) in enumerate(zip(attentions, sites, strict=True)):
        heads, key_heads, width = fixed_size(site.q, 1), fixed_size(site.k, 1), fixed_size(site.k, 3)
        layers.append(Layer(heads, key_heads, width, window_of(site.pattern)))
        _with_cache(node, site, index, visible[layers[-1].window], fused)
    return layers


def _with_cache(node: ir.Node, site: Sparse, index: int, visible: ir.Value, fused: bool) -> None:
    """Replace an attention with one over past and new keys and values.

    Args:
        visible: boolean, [batch, 1, new tokens, all tokens].
        fused: as one operator.
    """
    write, call = site.write, site.write.call
    model, dtype, batch = write.model, site.q.dtype, shape_of(visible)[0]
    key_heads, width = fixed_size(site.k, 1), fixed_size(site.k, 3)
    assert dtype is not None
    # OpenVINO assigns float16 to state only where its own attention reads it.
    kept = dtype if fused else ir.DataType.FLOAT
    operands: list[ir.Value] = []
    for new, past_name, name in zip((site.k, site.v), PAST, PRESENT, strict=True):
        past = add_input(model, past_name.format(index), kept, batch, key_heads, _PAST_TOKENS, width)
        present = call("Concat", past, new if kept == dtype else call("Cast", new, to=int(kept)), axis=2)
        present.name, present.type = name.format(index), ir.TensorType(kept)
        present.shape = ir.Shape([batch, key_heads, TOTAL, width])
        model.graph.outputs.append(present)
        operand = present if kept == dtype else call("Cast", present, to=int(dtype))
        operand.type, operand.shape = ir.TensorType(dtype), present.shape
        operands.append(operand)
    if fused:
        bias = call("Where", visible, site.number(0.0), site.number(site.floor))
        whole = (_repeated(write, value, fixed_size(site.q, 1) // key_heads) for value in operands)
        result = call("Attention", site.q, *whole, bias, scale=site.scale)
    else:
        options = {"scale": site.scale, "softcap": site.softcap, "causal": 0, "zeros": 1}
        result = write.op(ATTENTION, [site.q, *operands, visible], options, domain=DOMAIN)
    write.replace(node, result)


def _repeated(write: Writer, value: ir.Value, times: int) -> ir.Value:
    """Keys or values, each head several times in turn."""
    if times == 1:
        return value
    _, key_heads, _, width = shape_of(value)
    assert isinstance(key_heads, int) and isinstance(width, int)
    spread = write.expanded(write.call("Unsqueeze", value, 2), 1, 1, times, 1, 1)
    return write.shaped(spread, 0, key_heads * times, -1, width)


def _read_attention(model: openvino.Model) -> None:
    """Remove the replacement of NaN by zeros that OpenVINO's frontend adds to attention: with a finite mask there are none."""
    for node in model.get_ops():
        if node.get_type_name() != "Select":
            continue
        source = node.input_value(2)
        if source.get_node().get_type_name() == "ScaledDotProductAttention":
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(source)


def _make_stateful(model: openvino.Model, layers: int, texts: bool) -> None:
    """Keep keys and values as state, of no tokens at first, with rows chosen by beam_idx at each call."""
    rows = openvino.Dimension.dynamic() if texts else openvino.Dimension(1)
    free = openvino.Dimension.dynamic()
    for name in (INPUT_IDS, ATTENTION_MASK, POSITION_IDS):
        parameter: Any = model.input(name).get_node()
        parameter.set_partial_shape(openvino.PartialShape([rows, free]))
    beams: Any = opset13.parameter(openvino.PartialShape([rows]), openvino.Type.i32, name=BEAM_IDX)
    beams.output(0).get_tensor().set_names({BEAM_IDX})
    model.add_parameters([beams])
    pairs = {past.format(index): now.format(index) for index in range(layers) for past, now in zip(PAST, PRESENT, strict=True)}
    for name in pairs:
        past = model.input(name)
        parameter = past.get_node()
        _, heads, _, width = past.get_partial_shape()
        parameter.set_partial_shape(openvino.PartialShape([rows, heads, free, width]))
        readers = past.get_target_inputs()
        chosen: Any = opset13.gather(past, beams, opset13.constant(0))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    model.validate_nodes_and_infer_types()
    manager = passes.Manager()
    manager.register_pass(passes.MakeStateful(pairs))
    manager.run_passes(model)
    batch: Any = opset13.gather(opset13.shape_of(model.input(INPUT_IDS)), opset13.constant([0]), opset13.constant(0))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, width = (dimension.get_min_length() for dimension in node.get_output_partial_shape(0))
            sizes: Any = opset13.concat([batch, opset13.constant(np.array([heads, 0, width], np.int64))], 0)
            zero: Any = opset13.constant(0, node.get_output_element_type(0))
            node.set_arguments([opset13.broadcast(zero, sizes).output(0)])
    model.validate_nodes_and_infer_types()
