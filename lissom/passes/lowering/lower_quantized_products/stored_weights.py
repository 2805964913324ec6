"""Quantized weights in the layouts of the products, and their scales, as new weights of the program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from lissom.compiler.analysis.structure.quantized_linear import QuantizedLayer
from lissom.compiler.ir.calls import Dequantize
from lissom.compiler.ir.editor import Editor
from lissom.ops import formats

aten = torch.ops.aten


@dataclass(frozen=True)
class StoredWeights:
    """Weights derived from quantized ones; layers that share a weight share these too."""

    edit: Editor
    made: dict[tuple[fx.Node, str], fx.Node] = field(default_factory=dict["tuple[fx.Node, str]", "fx.Node"])

    def columns(self, layer: QuantizedLayer) -> fx.Node:
        """The quantized weight as [inputs, features], a transposed view of [features, inputs]: the layout for tensor cores."""
        return self.edit.call(aten.transpose.int, self.matrix(layer), 0, 1)

    def matrix(self, layer: QuantizedLayer) -> fx.Node:
        """The quantized weight, [features, inputs]."""
        if not layer.transposed:
            return layer.stored
        return self.keep(layer, "turned", lambda: layer.parts(self.edit)[0].contiguous())

    def scales(self, layer: QuantizedLayer, dtype: torch.dtype = torch.float32) -> fx.Node:
        """[features] in that dtype."""
        part = "scales" if dtype == torch.float32 else f"scales_{str(dtype).removeprefix('torch.')}"
        return self.keep(layer, part, lambda: per_feature(layer.parts(self.edit)[1], layer.sizes[0]).to(dtype))

    def sums(self, layer: QuantizedLayer) -> fx.Node:
        """Of the weight over its inputs, [features] in int32."""
        return self.keep(layer, "sums", lambda: layer.parts(self.edit)[0].sum(1, dtype=torch.int32))

    def halves(self, layer: QuantizedLayer) -> fx.Node:
        """The weight with two elements of four bits per byte, [features, inputs / 2]."""
        if not layer.transposed:
            return layer.stored  # packed like this
        return self.keep(layer, "turned", lambda: formats.pack_halves(layer.parts(self.edit)[0].contiguous()))

    def by_group(self, layer: QuantizedLayer) -> tuple[fx.Node, fx.Node | None]:
        """The scale and the zero point of a weight, [features, groups]."""
        stored = Dequantize(layer.weight)
        zero_point = None if stored.zero_point is None else self._grid(layer, "zero_points", stored.zero_point)
        return self._grid(layer, "group_scales", stored.scale), zero_point

    def _grid(self, layer: QuantizedLayer, part: str, node: fx.Node) -> fx.Node:
        tensor, sizes = self.edit.tensor(node), (layer.sizes[0], layer.blocks[1])
        if not layer.transposed and tensor.shape == sizes and tensor.is_contiguous():
            return node
        oriented = tensor.mT if layer.transposed and tensor.dim() else tensor
        return self.keep(layer, part, lambda: oriented.expand(sizes).contiguous())

    def keep(self, layer: QuantizedLayer, part: str, make: Callable[[], torch.Tensor]) -> fx.Node:
        """A new weight derived from the quantized one, made once."""
        key = layer.stored, part
        if key not in self.made:
            with self.edit.program.graph.inserting_before(layer.stored.next):
                self.made[key] = self.edit.weight(f"{layer.stored.target}_{part}", make())
        return self.made[key]


def per_feature(scale: torch.Tensor, features: int) -> torch.Tensor:
    """[features] of a scale that is [], [1, 1] or [features, 1], in float32."""
    return scale.float().reshape(-1).expand(features).contiguous()


def tiles(q: torch.Tensor) -> torch.Tensor:
    """A four-bit weight in the layout of `_weight_int4pack_mm`.

    Args:
        q: [features, inputs], not packed, in the range of its format. The operator packs elements from 0 to 15, two per byte,
            the first in the high half, with up to 8 tiles of 16 inputs next to each other.
    """
    low, high = (q + 8 if q.dtype == torch.int8 else q).to(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    together = next(count for count in (8, 4, 2) if q.shape[1] % (16 * count) == 0)
    return aten._convert_weight_to_int4pack.default((low << 4 | high).contiguous(), together)


def tile_grid(scale: torch.Tensor, zero_point: torch.Tensor | None, features: int, repeats: int) -> torch.Tensor:
    """Scales and offsets, [groups, features, 2] in bfloat16: `_weight_int4pack_mm` multiplies by (q - 8) · scale + offset.

    Args:
        scale: [features or 1, blocks] or []; a zero point in floating point is subtracted after scaling.
        zero_point: likewise.
        repeats: groups per block.
    """
    step = scale.float().reshape(-1, scale.shape[-1] if scale.dim() else 1).expand(features, -1)
    if zero_point is None:
        offset = torch.zeros_like(step)
    elif zero_point.is_floating_point():
        offset = 8 * step - zero_point.float().reshape_as(step)
    else:
        offset = (8 - zero_point.float()) * step
    return torch.stack((step, offset), -1).repeat_interleave(repeats, 1).transpose(0, 1).bfloat16().contiguous()
