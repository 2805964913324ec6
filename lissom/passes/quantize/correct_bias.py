"""Subtract the mean quantization error of a layer's output from its bias.

Quantized weights and activations shift the mean of a layer's output. With E the mean over the tokens of the calibration data,
without padding, W and x the layer's weight and input before the first lossy pass, and W̃ and x̃ the current ones,

    b += W·E[x] - W̃·E[x̃]

Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, §4.2, equations 16 and 17; E is from
data in place of batch norms, as in Finkelstein et al. 2019, Fighting Quantization Bias With Bias.
https://arxiv.org/abs/1906.04721, https://arxiv.org/abs/1906.03193

The pass comes after `quantize`, and after `gptq` where there is one. Layers are corrected in the order they run, each on
the outputs of the corrected layers before it. A layer without a bias gets one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from lissom.compiler.analysis.module_filter import obstacle_by_name
from lissom.compiler.analysis.structure.linear import bias_of, is_linear
from lissom.compiler.analysis.structure.matrix import RoundedMatrix, matrix_of, rounded_matrix_of, treated_layers
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.calibration.layer_sweep import sweep
from lissom.compiler.calibration.statistics import NO_TOKENS
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Linear
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.interpreter import evaluate_nodes
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.errors import RequirementError

aten = torch.ops.aten


@dataclass(frozen=True)
class CorrectBias(Approximation):
    """Corrects biases of quantized layers so that their outputs keep their mean.

    Attributes:
        lm_head: corrects LM heads and classifiers too.
        skip: module paths to leave as they are, with `*` and `?`, separated by commas: `"encoder.layer.0,*.11"`.
        only: module paths to change, in the same form; others stay as they are.
    """

    lm_head: bool = False
    skip: str = ""
    only: str = ""
    cheapens: ClassVar[bool] = False

    def run(self, edit: Editor) -> None:
        if not edit.data:
            raise RequirementError("correct-bias needs calibration data: pass data=")
        layers = treated_layers(edit, rounded_matrix_of, lambda node, _: self._obstacle(edit, node))
        for layer in layers:
            _own_bias(edit, layer)
        wanted = _means(edit, layers)
        for finished, (layer, read) in enumerate(sweep(edit.program, edit.data, list(layers), edit.reference)):
            edit.report("layers", finished, len(layers))
            edit.current = layer
            rows = torch.cat(read)
            if not len(rows) or not bool(wanted[layer].isfinite().all()):
                edit.skip(layer, NO_TOKENS)
                continue
            mean = rows.double().mean(0)
            bias = bias_of(layer)
            assert bias is not None
            held = edit.tensor(bias)
            rounded = evaluate_nodes(edit.program.graph_module, layers[layer].quantizer).double()
            shift = wanted[layer] - (rounded.T if layers[layer].transposed else rounded) @ mean
            edit.set_weight(bias, (held.double() + shift).to(held.dtype))
            edit.rewritten += 1

    def _obstacle(self, edit: Editor, node: fx.Node) -> str | None:
        if (reason := obstacle_by_name(node, skip=self.skip, only=self.only)) is not None:
            return reason
        if node in edit.program.fact(structure).lm_heads and not self.lm_head:
            return "it is an LM head or classifier; lm_head=true includes it"
        if _original(edit, node) is None:
            return "the program before quantization is not known here, or has no such layer"
        given = bias_of(node)
        if given is None:
            return None if node.target is aten.linear.default else "it is a plain product, which has no place for a bias"
        if given.op != "get_attr" or len(given.users) > 1:
            return "its bias is computed, or read elsewhere too"
        return None


def _original(edit: Editor, layer: fx.Node) -> fx.Node | None:
    """The layer's counterpart in the program before the first lossy pass; None if there is none."""
    if edit.reference is None:
        return None
    original = next((node for node in edit.reference.nodes() if node.name == layer.name), None)
    if original is None or not is_linear(original) or isinstance(matrix_of(original), str):
        return None
    return original if nodes.node_type(original) == nodes.node_type(layer) else None


def _means(edit: Editor, layers: dict[fx.Node, RoundedMatrix]) -> dict[fx.Node, torch.Tensor]:
    """W·E[x] of each layer in the program before the first lossy pass, [features out]."""
    reference = edit.reference
    originals = {layer: original for layer in layers if (original := _original(edit, layer)) is not None}
    if reference is None or not originals:
        return {}
    means: dict[fx.Node, torch.Tensor] = {}
    back = {original: layer for layer, original in originals.items()}
    for original, read in sweep(reference, edit.data, list(back)):
        matrix = matrix_of(original)
        assert not isinstance(matrix, str)
        means[back[original]] = matrix.read(reference).double() @ torch.cat(read).double().mean(0)
    return means


def _own_bias(edit: Editor, layer: fx.Node) -> None:
    """Give a linear layer without a bias one of zeros."""
    if bias_of(layer) is not None:
        return
    form = nodes.tensor_type(layer)
    path = nodes.origin(layer).module_path or layer.name
    zeros = torch.zeros(nodes.fixed_size(layer, -1), dtype=form.dtype, device=form.device)
    with edit.before(layer):
        bias = edit.weight(f"{path}.bias", zeros)
    edit.change_call(layer, aten.linear.default, Linear(layer).x, Linear(layer).weight, bias)
    edit.rewritten -= 1
