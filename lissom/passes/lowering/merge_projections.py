"""Merge linear layers with the same input into one, followed by a split: q, k and v, or gate and up.

    x Wqᵀ, x Wkᵀ, x Wvᵀ  ->  split(x [Wq; Wk; Wv]ᵀ)

One large matrix product uses the cores better than several small ones, and reads its input once; but the outputs are then
strided slices. Which wins depends on the sizes and the machine, so by default each group is timed both ways at the sizes of the
example, and merged where that is faster. The merged weight replaces the old ones in the program; the model keeps its own.
Quantized weights are merged in their format, together with their scales; where the kernels read weights of five and six bits
faster than those of eight, only weights of as many bits are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional

from lissom.compiler.analysis.cost import example_shape
from lissom.compiler.analysis.structure.quantized_linear import is_owned, layer_path, store_like
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Dequantize, Linear
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.match import is_read_by
from lissom.compiler.ir.operators import EPILOGUES, FAKE_QUANTIZES
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.measure.timing import GAIN, median_seconds
from lissom.ops.native import reads_few_bits_faster
from lissom.ops.quantization import dequantize
from lissom.ops.weight_quantized_linear import narrowest

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeProjections(Rewrite):
    """Merges linear layers with the same input into one with a split, where that is measured faster.

    Attributes:
        always: merges without measuring.
        gates: merges the gate and up projections of a gated feed-forward too; apart, each can fuse its own epilogue.
    """

    always: bool = False
    gates: bool = True

    def run(self, edit: Editor) -> None:
        times: dict[object, tuple[float, float]] = {}
        for group in _groups(edit):
            if not self.gates and any(map(_is_gate, group)):
                continue
            if not self.always:
                key = _sizes(group)
                if key not in times:
                    times[key] = _measure(*key)
                apart, merged = times[key]
                if merged > GAIN * apart:
                    edit.skip(group[0].node, f"merged it takes {1e3 * merged:.3g} ms, apart {1e3 * apart:.3g} ms")
                    continue
            _merge(edit, group)


def _groups(edit: Editor) -> list[list[Linear]]:
    """Groups of two or more linear layers with the same input, whose weights have no other readers."""
    readers: dict[tuple[object, ...], list[Linear]] = {}
    for layer in map(Linear, edit.nodes(*Linear.targets)):
        # A slice of a merged output has other strides than a separate output.
        if is_read_by(layer.node, (aten.as_strided.default,)):
            continue
        owned = is_owned(layer.weight) and (layer.bias is None or is_owned(layer.bias))
        if owned and nodes.tensor_type(layer.weight).rank == 2:
            readers.setdefault((layer.x, layer.bias is None, *_storage(edit, layer)), []).append(layer)
    return [group for group in readers.values() if len(group) > 1]


def _is_gate(layer: Linear) -> bool:
    """True when the only reader of the layer's output is an activation."""
    return all(user.target in EPILOGUES for user in layer.node.users)


def _storage(edit: Editor, layer: Linear) -> tuple[object, ...]:
    """Properties that weights must have in common to be merged: format, bits, the scale of the tensor, and granularity."""
    if layer.weight.op == "get_attr":
        return ()
    q, *grid = map(edit.tensor, layer.weight.all_input_nodes)
    format = str(layer.weight.kwargs["format"])
    if reads_few_bits_faster() and not nodes.is_call(layer.x, *FAKE_QUANTIZES):
        format = narrowest(q, format)
    return format, Dequantize(layer.weight).tensor_scale, *((tensor.dtype, tensor.shape[1:]) for tensor in grid)


def _sizes(group: Sequence[Linear]) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]:
    """Sizes of the input at the example, output features of each layer, dtype and device: what the time depends on."""
    x = nodes.tensor_type(group[0].x)
    return example_shape(group[0].x), tuple(map(_features, group)), x.dtype, x.device


def _features(layer: Linear) -> int:
    return nodes.fixed_size(layer.weight, 0)


def _measure(
    shape: tuple[int, ...], features: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Median seconds of the separate and of the merged layers; each output is read once, so that strided rows are timed too."""
    with torch.inference_mode():
        x = torch.randn(shape, device=device).to(dtype)
        weights = [torch.randn(size, shape[-1], device=device).to(dtype) for size in features]
        joined = torch.cat(weights)

        def apart() -> None:
            for weight in weights:
                functional.linear(x, weight).add_(1)

        def merged() -> None:
            for part in functional.linear(x, joined).split_with_sizes(features, -1):
                part.add_(1)

    threads = torch.get_num_threads()
    return median_seconds(apart, threads), median_seconds(merged, threads)


def _join(edit: Editor, weights: Sequence[fx.Node], name: str) -> fx.Node:
    """A weight that concatenates these along output features; use inside `edit.before`."""
    if weights[0].target is dequantize:
        parts = zip(*(_parts(edit, weight) for weight in weights), strict=True)
        return store_like(edit, weights[0], name, map(torch.cat, parts))
    joined = torch.cat(list(map(edit.tensor, weights)))
    return edit.weight(name, nn.Parameter(joined, requires_grad=False))


def _parts(edit: Editor, weight: fx.Node) -> list[torch.Tensor]:
    """The tensors of a dequantized weight; a per-tensor scale is repeated per row."""
    q, *grid = map(edit.tensor, weight.all_input_nodes)
    return [q, *(tensor.expand(q.shape[0], 1) if tensor.numel() == 1 else tensor for tensor in grid)]


def _merge(edit: Editor, group: Sequence[Linear]) -> None:
    first, biases = group[0], [layer.bias for layer in group if layer.bias is not None]
    path = f"{layer_path(first.weight).rpartition('.')[0]}.merged".lstrip(".")
    with edit.before(first.node, like=[layer.node for layer in group]):
        weight = _join(edit, [layer.weight for layer in group], f"{path}.weight")
        bias = _join(edit, biases, f"{path}.bias") if biases else None
        product = edit.call(aten.linear.default, first.x, weight, bias)
        parts = edit.call(aten.split_with_sizes.default, product, [_features(layer) for layer in group], -1)
        pieces = [edit.item(parts, index) for index in range(len(group))]
    for layer, piece in zip(group, pieces, strict=True):
        edit.replace(layer.node, piece)
