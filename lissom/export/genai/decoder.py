"""A program without a KV cache as the ONNX decoder that ONNX Runtime GenAI runs: inputs for the cache, and positions.

    logits, present = decoder(input_ids, attention_mask, position_ids, past)

input_ids, position_ids: [1, tokens], the new tokens of a text. attention_mask: [1, all tokens so far], ones. past: keys and
values of each layer, [1, key heads, tokens or more, head_dim], and present those after the call; they may be one buffer.

Each causal attention becomes `com.microsoft.GroupQueryAttention`, which appends the new keys and values to the cache. Where the
program counts its tokens from 0, the decoder reads position_ids. Nothing else in the program depends on earlier tokens; the
writer compares a text in parts with the whole text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from lissom.backends.exported import kind_and_reason
from lissom.backends.onnx.attention import CONTRIB, skip_joins
from lissom.backends.onnx.export import export_onnx
from lissom.backends.onnx.integer_matmul import expand_integers
from lissom.backends.onnx.quantized_layers import quantized_layers
from lissom.backends.onnx.rewriting import Writer, constant_of, fixed_size, nodes_of, shape_of
from lissom.backends.onnx.sparse_attention import Sparse
from lissom.backends.onnx.translation import DOMAIN, SPARSE_ATTENTION, check_translatable
from lissom.backends.onnx.variants import RMS_NORMS, ROTARY, write_variant
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import ATTENTIONS, FAKE_QUANTIZES
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.errors import UnsupportedError
from lissom.export.genai.attention import UnmaskAttention, UnpadText, window_of
from lissom.export.genai.families import ATTENTION_MASK, INPUT_IDS, LOGITS, PAST, POSITION_IDS, PRESENT, Layer
from lissom.ops.formats import FORMATS
from lissom.ops.quantization import dequantize
from lissom.passes.canonical.fold_constants import FoldConstants
from lissom.passes.quantize.fold_quantized_weights import FoldQuantizedWeights

_OWN = (INPUT_IDS, ATTENTION_MASK, POSITION_IDS)
_TOKENS, _PAST_TOKENS, _TOTAL = "sequence_length", "past_sequence_length", "total_sequence_length"
_CHOICES = "quantize{scheme=int4-weight} or quantize{scheme=int8-weight}"


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
    _check_call(program)
    exported = _exported(_causal(program, example), example)
    products = _products(exported)
    mask = _take_mask(exported)
    _take_positions(exported)
    layers = _add_cache(exported, mask)
    logits = _only_logits(exported)
    _name_sizes(exported)
    # ONNX Runtime would fuse int8 layers that are left in floating point to products that round activations.
    expand_integers(exported, small=True)
    model, _ = write_variant(exported, [RMS_NORMS, ROTARY])
    return OnnxDecoder(model, layers, products, fixed_size(logits, -1))


def _check_call(program: Program) -> None:
    """Refuse a program that is not called with tokens alone, of any number. Raises UnsupportedError."""
    leaves = {leaf.path: leaf.type for leaf in program.signature.tensors}
    other = next((path for path in leaves if path not in _OWN), None)
    if other is not None or INPUT_IDS not in leaves:
        raise UnsupportedError(
            f"ONNX Runtime GenAI calls a decoder with {', '.join(_OWN)}, and {program.name} reads "
            f"'{other or next(iter(leaves))}'; call lissom.optimize with example inputs of these names"
        )
    batch, tokens = leaves[INPUT_IDS].shape[:2]
    if isinstance(tokens, int) or (isinstance(batch, int) and batch != 1):
        raise UnsupportedError(
            f"{program.name} takes {INPUT_IDS} of [{batch}, {tokens}] alone, and a decoder takes one text of any length; the "
            f"report of lissom.optimize says why its sizes are fixed"
        )
    if program.state:
        raise UnsupportedError(f"{program.name} keeps '{program.state[0]}', and ONNX Runtime GenAI keeps keys and values alone")
    if any(nodes.is_tensor(n) and n.op != "output" and nodes.tensor_type(n).dtype == torch.bfloat16 for n in program):
        raise UnsupportedError(
            f"ONNX Runtime lacks kernels of bfloat16 on a CPU, and {program.name} computes in it; convert the model to float32"
        )


def _causal(program: Program, example: Sample) -> Program:
    """The program with stored integers and without masks. Raises UnsupportedError if an attention keeps its own."""
    passes = [FoldConstants(shared=True), FoldQuantizedWeights(), UnpadText(), UnmaskAttention()]
    found, history = Pipeline(passes, [example], checks="structural").run(program)
    rounded = found.nodes(*FAKE_QUANTIZES)
    if rounded:
        raise UnsupportedError(
            f"{program.name} quantizes activations, at '{rounded[0].name}', which is not written for ONNX Runtime GenAI; "
            f"choose {_CHOICES}"
        )
    odd = next((node for node in found.nodes(dequantize) if not _is_stored(node)), None)
    if odd is not None:
        raise UnsupportedError(
            f"'{nodes.operand(odd).target}' of {program.name} is in {odd.kwargs['format']}, and MatMulNBits of ONNX Runtime "
            f"takes integers of four and eight bits; choose {_CHOICES}"
        )
    left = found.nodes(*ATTENTIONS)
    if left:
        reasons = {skip.node: skip.reason for skip in history.steps[-1].skipped}
        where = nodes.origin(left[0]).module_path or left[0].name
        raise UnsupportedError(
            f"the attention of {program.name} in '{where}' cannot be GroupQueryAttention of ONNX Runtime: "
            f"{reasons.get(left[0].name, 'it is no causal attention')}"
        )
    return found


def _is_stored(node: torch.fx.Node) -> bool:
    """True for a dequantized weight in integers of four or eight bits."""
    form = FORMATS[str(node.kwargs["format"])]
    return form.is_integer and form.bits in (4, 8)


def _exported(program: Program, example: Sample) -> ir.Model:
    check_translatable(program, "ONNX Runtime")
    try:
        return export_onnx(program, example, decompose=False)
    # The exporter's errors have no common class; with decompositions it translates more operators.
    except Exception:
        pass
    try:
        return export_onnx(program, example, decompose=True)
    except Exception as error:
        raise UnsupportedError(f"{program.name} has no translation to ONNX: {kind_and_reason(error)}") from error


def _products(model: ir.Model) -> Counter[str]:
    """The number of quantized products of each kind. Raises UnsupportedError for one without a kernel."""
    products: Counter[str] = Counter()
    for layer in quantized_layers(model):
        if layer.obstacle is not None:
            raise UnsupportedError(
                f"the quantized layer '{layer.module}' has no kernel in ONNX Runtime: {layer.obstacle}; choose {_CHOICES}"
            )
        assert layer.stored is not None
        products[f"int{layer.stored.form.bits} in blocks of {layer.block}"] += 1
    return products


def _take_mask(model: ir.Model) -> ir.Value:
    """A new attention mask, [1, tokens so far], in place of the program's, of which only sizes are read."""
    inputs = {value.name: value for value in model.graph.inputs}
    if (old := inputs.get(ATTENTION_MASK)) is not None:
        ir.convenience.replace_all_uses_with(old, inputs[INPUT_IDS])
        model.graph.inputs.remove(old)
    return _input(model, ATTENTION_MASK, ir.DataType.INT64, 1, _TOTAL)


def _input(model: ir.Model, name: str, dtype: ir.DataType, *sizes: int | str | ir.SymbolicDim) -> ir.Value:
    """A new input of the model."""
    value = ir.val(name, dtype, ir.Shape(sizes))
    model.graph.inputs.append(value)
    return value


def _take_positions(model: ir.Model) -> None:
    """Read position_ids where the program counts its tokens from 0."""
    inputs = {value.name: value for value in model.graph.inputs}
    tokens, given = shape_of(inputs[INPUT_IDS])[1], inputs.get(POSITION_IDS)
    if given is None:
        given = _input(model, POSITION_IDS, ir.DataType.INT64, 1, tokens)
    for node in nodes_of(model, "", "Range"):
        first, step = constant_of(node.inputs[0]), constant_of(node.inputs[2])
        counts = first is not None and step is not None and first == 0 and step == 1
        if not counts or list(shape_of(node.outputs[0])) != [tokens]:
            continue
        write = Writer(model)
        counted = write.shaped(given, -1)
        dtype = node.outputs[0].dtype
        if dtype not in (None, ir.DataType.INT64):
            counted = write.call("Cast", counted, to=int(dtype))
        write.replace(node, counted)


def _add_cache(model: ir.Model, mask: ir.Value) -> list[Layer]:
    """Replace each attention with one that keeps its keys and values; returns their sizes."""
    attentions = nodes_of(model, DOMAIN, SPARSE_ATTENTION)
    if not attentions:
        raise UnsupportedError("the program has no attention, and ONNX Runtime GenAI keeps keys and values alone")
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
    past = [_input(model, name.format(index), dtype, 1, key_heads, _PAST_TOKENS, width) for name in PAST]
    inputs = [*map(site.joined, (site.q, site.k, site.v)), *past, *lengths]
    options: dict[str, float] = {"num_heads": heads, "kv_num_heads": key_heads, "scale": site.scale}
    options |= {"local_window_size": window} if window is not None else {}
    options |= {"softcap": site.softcap} if site.softcap else {}
    joined, *present = site.write.op_multi_out("GroupQueryAttention", inputs, options, domain=CONTRIB, num_outputs=3)
    for value, name in zip(present, PRESENT, strict=True):
        value.name, value.type = name.format(index), ir.TensorType(dtype)
        value.shape = ir.Shape([1, key_heads, _TOTAL, width])
    batch, _, tokens, _ = shape_of(site.q)
    joined.type, joined.shape = site.q.type, ir.Shape([batch, tokens, heads * width])
    apart = site.write.shaped(joined, 0, 0, heads, width)
    skip_joins(site.result, joined)
    site.write.replace(node, site.write.call("Transpose", apart, perm=(0, 2, 1, 3)))
    model.graph.outputs.extend(present)
    return Layer(heads, key_heads, width, window)


def _only_logits(model: ir.Model) -> ir.Value:
    """The logits, after the other outputs of the program were dropped. Raises UnsupportedError without logits."""
    kept = {LOGITS, *(value.name for value in model.graph.outputs if (value.name or "").startswith("present."))}
    for value in [value for value in model.graph.outputs if value.name not in kept]:
        model.graph.outputs.remove(value)
    logits = model.graph.outputs[0]
    if logits.name != LOGITS or len(shape_of(logits)) != 3:
        raise UnsupportedError(
            "the program does not return logits for each token, from which ONNX Runtime GenAI takes the next"
        )
    return logits


def _name_sizes(model: ir.Model) -> None:
    """Name the sizes of inputs and outputs as ONNX Runtime GenAI does; there is one text."""
    for value in model.graph.inputs:
        if value.name in (INPUT_IDS, POSITION_IDS):
            value.shape = ir.Shape([1, _TOKENS])
    logits = model.graph.outputs[0]
    logits.shape = ir.Shape([1, _TOKENS, fixed_size(logits, -1)])
