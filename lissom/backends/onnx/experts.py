"""Quantized experts in ONNX: the stack of a mixture's matrices, from which a product gathers one, as a weight per expert.

    MatMul(Split(Q(x))[e], Gather(Dequantize(stack), e))   ->   MatMul(Q(Split(x)[e]), Dequantize(stack[e]))

Each product then has a quantized matrix and input of its own, and may get an integer kernel.
"""

from __future__ import annotations

import onnx_ir as ir

from lissom.backends.onnx.quantization import format_of, is_quantization, operands
from lissom.backends.onnx.rewriting import Writer, constant_of, fixed_size, nodes_of, sizes_of
from lissom.backends.onnx.translation import DEQUANTIZE, DOMAIN, ROUND, ROUND_DYNAMIC

_SWAPPED = [0, 2, 1]


def split_experts(model: ir.Model) -> None:
    """Give each expert a quantized weight and a quantized input of its own."""
    splits: dict[ir.Node, None] = {}
    for gather in nodes_of(model, "", "Gather"):
        index, source = constant_of(gather.inputs[1]), gather.inputs[0]
        swap = source.producer() if source is not None else None
        swaps = swap is not None and swap.op_type == "Transpose" and [*swap.attributes.get_ints("perm", ())] == _SWAPPED
        stored = swap.inputs[0].producer() if swap is not None and swaps and swap.inputs[0] is not None else swap
        # A list of one index would keep the dimension of experts.
        if stored is None or not is_quantization(stored, DEQUANTIZE) or index is None or index.ndim:
            continue
        if gather.attributes.get_int("axis", 0) != 0 or not _is_stack(stored):
            continue
        splits |= dict.fromkeys(node for product in gather.outputs[0].consumers() if (node := _split_of(product)) is not None)
        write = Writer(model)
        expert = _expert(write, stored, int(index.reshape(())))
        write.replace(gather, write.op("Transpose", [expert], {"perm": [1, 0]}) if swaps else expert)
    for split in splits:
        _quantize_parts(model, split)


def _is_stack(stored: ir.Node) -> bool:
    """True for a constant stack of matrices."""
    values = [constant_of(operand) for operand in operands(stored) if operand is not None]
    return all(value is not None for value in values) and values[0] is not None and values[0].ndim == 3


def _expert(write: Writer, stored: ir.Node, index: int) -> ir.Value:
    """The dequantized matrix of one expert."""
    parts: list[ir.Value | None] = []
    for operand in operands(stored):
        value = constant_of(operand)
        # A scale of the whole stack has no dimensions.
        if operand is not None and value is not None and value.ndim == 3:
            parts.append(write.weight(operand, str(index), value[index], operand.dtype))
        else:
            parts.append(operand)
    expert = write.op(DEQUANTIZE, parts, {"format": format_of(stored).name}, domain=DOMAIN)
    whole = stored.outputs[0]
    expert.type, expert.shape = whole.type, ir.Shape(sizes_of(whole)[1:])
    return expert


def _split_of(product: ir.Node) -> ir.Node | None:
    """The split of quantized rows by expert that a product reads; None for any other product."""
    split = product.inputs[0].producer() if product.op_type == "MatMul" and product.inputs[0] is not None else None
    if split is None or split.op_type != "Split" or split.attributes.get_int("axis", 0) != 0 or split.inputs[0] is None:
        return None
    rounds = split.inputs[0].producer()
    if rounds is None or not is_quantization(rounds, ROUND, ROUND_DYNAMIC):
        return None
    # A scale of all rows is not that of some.
    per_tensor = rounds.op_type == ROUND_DYNAMIC and rounds.attributes["granularity"].as_string() == "tensor"
    return None if per_tensor else split


def _quantize_parts(model: ir.Model, split: ir.Node) -> None:
    """Quantize the rows of each expert after the split rather than all rows before it."""
    rounded = split.inputs[0]
    rounds = rounded.producer() if rounded is not None else None
    assert rounded is not None and rounds is not None, "the split is of quantized rows"
    split.replace_input_with(0, rounds.inputs[0])
    for part in split.outputs:
        part.type, part.shape = rounded.type, ir.Shape([None, fixed_size(rounded, -1)])
        readers = [*part.uses()]
        write = Writer(model)
        result = write.op(rounds.op_type, [part, *rounds.inputs[1:]], dict(rounds.attributes), domain=DOMAIN)
        result.type, result.shape = part.type, part.shape
        for reader, place in readers:
            reader.replace_input_with(place, result)
        model.graph.insert_after(split, write.nodes)
