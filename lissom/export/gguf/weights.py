"""Weights of a program in the types of GGUF files: floating point, or blocks of integers with scales.

A weight that the program holds as integers is written with these integers, where a block type has room for them:

    int8   Q8_0    w = scale · q             int4   Q4_0    w = scale · q
    uint4  Q4_1    w = scale · q + minimum, minimum = -scale · zero_point
    fp4    MXFP4   w = scale · q, with scales in e8m0

A block has 32 weights of one row. Scales and minimums are float16; those that are not are rounded to it, by 1/2,048 at most.
Scales of MXFP4 are a byte. Weights in mxfp8 and nvfp4 are written in floating point.
The layout is that of ggml (ggml-common.h), github.com/ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.export.quantized_weights import attribute_of, in_floating_point, quantized_weights
from lissom.frontends.checkpoints.stored_weights import StoredWeight, stored_form
from lissom.ops.formats import fp4_codes
from lissom.ops.gguf_blocks import BLOCK_TYPES, BlockType, StoredBlocks, unpack_blocks

_KINDS = {"int8": "Q8_0", "int4": "Q4_0", "uint4": "Q4_1", "fp4": "MXFP4"}
_ROWS = 4096
"""The number of rows that are dequantized at once for a comparison."""
_HALF = torch.finfo(torch.float16)


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks.

    Attributes:
        data: the bytes, uint8 [rows, bytes of a row].
        exact: the program's integers and scales, before the scales are rounded.
    """

    kind: BlockType
    data: torch.Tensor
    exact: StoredBlocks | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.data), self.data.shape[1] // self.kind.bytes * self.kind.size

    def value(self, rows: slice = slice(None)) -> torch.Tensor:
        """These rows in float32."""
        part = self.data[rows]
        return unpack_blocks(part.reshape(-1), self.kind, len(part), self.shape[1]).dequantize(slice(None))


Weight = torch.Tensor | Blocks


def value_of(weight: Weight) -> torch.Tensor:
    """The weight in floating point, as the program computes it."""
    if not isinstance(weight, Blocks):
        return weight
    return weight.value() if weight.exact is None else in_floating_point(weight.exact)


def rows_of(weight: Weight, rows: slice) -> Weight:
    """Some rows of the weight."""
    if not isinstance(weight, Blocks):
        return weight[rows]
    return Blocks(weight.kind, weight.data[rows], None if weight.exact is None else weight.exact.of_rows(rows))


def with_rows(weight: Weight, order: torch.Tensor) -> Weight:
    """The weight with its rows in another order."""
    return Blocks(weight.kind, weight.data[order]) if isinstance(weight, Blocks) else weight[order]


def padded(weight: Weight, shape: Sequence[int]) -> Weight:
    """The weight with zeros after its rows and columns."""
    if tuple(weight.shape) == tuple(shape):
        return weight
    if isinstance(weight, Blocks) and shape[1] % weight.kind.size == 0:
        # A block of zero bytes has the scale 0.
        columns = shape[1] // weight.kind.size * weight.kind.bytes
        return Blocks(weight.kind, _enlarged(weight.data, (shape[0], columns)))
    return _enlarged(value_of(weight), shape)


def joined(weights: Sequence[Weight]) -> Weight:
    """The rows of several weights in one; in floating point where their types differ."""
    blocks = [weight for weight in weights if isinstance(weight, Blocks)]
    if len(blocks) == len(weights) and len({block.kind.name for block in blocks}) == 1:
        return Blocks(blocks[0].kind, torch.cat([block.data for block in blocks]))
    return torch.cat([value_of(weight) for weight in weights])


def _enlarged(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    enlarged = tensor.new_zeros(tuple(shape))
    enlarged[tuple(slice(size) for size in tensor.shape)] = tensor
    return enlarged


def read_weights(program: Program, model: nn.Module, norm_offset: float, transposed: Collection[str] = ()) -> dict[str, Weight]:
    """The program's weights by the model's names, matrices [out, in].

    Those that it dequantizes are in blocks where there is a type for them.

    Args:
        program: with its quantized weights folded. A weight with the values that the model's GGUF file stores is in its blocks.
        norm_offset: what the model adds to the weights of norms, which `fold-constants` adds at compile time.
        transposed: the names of weights that the model has as [in, out].
    """
    originals = dict(model.named_parameters(remove_duplicate=False))
    plain = {name: weight.detach().cpu() for name, weight in program.weights().items()}
    weights: dict[str, Weight] = {name: weight.T if name in transposed else weight for name, weight in plain.items()}
    for weight in quantized_weights(program):
        if weight.order is None:
            stored = weight.stored.transposed() if weight.name in transposed else weight.stored
            weights[weight.name] = blocks_of(stored) or in_floating_point(stored)
        else:
            weights[weight.name] = in_floating_point(weight.stored)[:, weight.order.argsort()]
    for node in program.nodes(torch.ops.aten.rms_norm.default):
        scale = attribute_of(nodes.argument(node, "weight"))
        if scale is not None and str(scale.target) not in originals:
            weights[f"{nodes.origin(node).module_path}.weight"] = program.weight(str(scale.target)).detach().cpu() - norm_offset
    for name, weight in weights.items():
        stored = stored_form(originals[name]) if name in originals else None
        if isinstance(stored, StoredWeight) and stored.transposed == (name in transposed):
            weights[name] = _as_in_file(stored, weight) or weight
    return weights


def blocks_of(stored: StoredBlocks) -> Blocks | None:
    """The integers in the type that has room for them; None where none has, or scales differ within 32 weights of a row."""
    kind = BLOCK_TYPES.get(_KINDS.get(stored.format, ""))
    if kind is None or stored.q.dim() != 2 or stored.q.shape[1] % kind.size:
        return None
    rows, count = len(stored.q), stored.q.shape[1] // kind.size
    if kind.name == "MXFP4":
        return _blocks_of_fp4(stored, kind, rows, count)
    scale = _by_block(stored.scale.float(), rows, count)
    minimum = None if stored.zero_point is None else _by_block(stored.zero_point.float(), rows, count)
    if scale is None or (stored.zero_point is not None and minimum is None) or (minimum is None) == (kind.name == "Q4_1"):
        return None
    parts = [scale]
    if minimum is not None and stored.zero_point is not None:
        parts.append(-minimum if stored.zero_point.is_floating_point() else -minimum * scale)
    halves = [part.half() for part in parts]
    if not all(map(_holds, halves, parts)):
        return None
    grouped = stored.q.view(rows, count, kind.size)
    if kind.name == "Q8_0":
        integers = grouped.view(torch.uint8)
    else:
        integers = halves_apart((grouped.to(torch.uint8) + (8 if kind.name == "Q4_0" else 0)) & 15)
    heads = [half.unsqueeze(-1).view(torch.uint8) for half in halves]
    return Blocks(kind, torch.cat([*heads, integers], -1).view(rows, count * kind.bytes), stored)


def _blocks_of_fp4(stored: StoredBlocks, kind: BlockType, rows: int, count: int) -> Blocks | None:
    """Blocks of MXFP4; None for scales in another dtype, as NVFP4 has them."""
    if stored.scale.dtype != torch.float8_e8m0fnu or stored.scale.shape != (rows, count):
        return None
    codes = halves_apart(fp4_codes(stored.q.view(rows, count, kind.size)))
    data = torch.cat((stored.scale.view(torch.uint8).unsqueeze(-1), codes), -1)
    return Blocks(kind, data.view(rows, count * kind.bytes), stored)


def halves_apart(q: torch.Tensor) -> torch.Tensor:
    """Four-bit elements of blocks of 32 in 16 bytes, the first 16 of a block in the low halves."""
    return q[..., :16] | (q[..., 16:] << 4)


def _holds(half: torch.Tensor, part: torch.Tensor) -> bool:
    """True if float16 holds these values with all its digits."""
    return bool((half.isfinite() & ((half.abs() >= _HALF.tiny) | (part == 0))).all())


def _by_block(values: torch.Tensor, rows: int, blocks: int) -> torch.Tensor | None:
    """Scales for blocks of 32, [rows, blocks], of scales for tensors, channels or groups; None for smaller groups."""
    if values.dim() == 0:
        return values.expand(rows, blocks)
    if blocks % values.shape[1] or len(values) not in (1, rows):
        return None
    return values.repeat_interleave(blocks // values.shape[1], 1).expand(rows, blocks)


def _as_in_file(stored: StoredWeight, weight: Weight) -> Blocks | None:
    """The blocks of the file that the model was read from; None where the weight has other values now."""
    if tuple(weight.shape) != (stored.rows, stored.columns):
        return None
    data = stored.blocks.view(stored.rows, -1)
    original = Blocks(stored.kind, data if stored.order is None else data[stored.order])
    for start in range(0, stored.rows, _ROWS):
        rows = slice(start, start + _ROWS)
        now = weight.value(rows) if isinstance(weight, Blocks) else weight[rows]
        if not torch.equal(original.value(rows), now.float().cpu()):
            return None
    return original
