"""The quantized layers of a program as schemes of compressed-tensors: bits, scales, zero points and inputs.

| program | weights | inputs | format |
|---|---|---|---|
| int4, uint4, int8, uint8 | int, 4 or 8 bits, per tensor, channel or group | | pack-quantized |
| the same with uint8 inputs | int, 8 bits | int8 with zero points, computed at run time or fixed | int-quantized |
| fp8 | e4m3 | e4m3, computed at run time | float-quantized |

The uint8 inputs of a program, scale (max - min) / 255, are the asymmetric int8 inputs of the format, shifted by 128. The format
rounds x / scale + zero_point and the program x / scale, which differs for values in the middle of two integers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import input_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Dequantize, Embedding
from lissom.compiler.ir.program import Program
from lissom.errors import UnsupportedError
from lissom.export.quantized_weights import QuantizedWeight, constant
from lissom.frontends.checkpoints.compressed_tensors_config import Scheme
from lissom.frontends.checkpoints.quantized_layers import describe
from lissom.ops.formats import FORMATS, dequantize
from lissom.ops.gguf_blocks import StoredBlocks
from lissom.ops.quantization import fake_quantize, fake_quantize_dynamic

aten = torch.ops.aten
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""The layers that vLLM makes one of."""
_WEIGHTS = ("int4", "uint4", "int8", "uint8", "fp8")
_INPUTS = {("uint8", "token"), ("uint8", "tensor"), ("fp8", "token"), ("fp8", "tensor")}
_CHOICES = "quantize{scheme=int4-weight}, int8-weight, int8-dynamic, int8-static or fp8"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Inputs:
    """How the input of a layer is quantized.

    Attributes:
        strategy: what a scale is for, `token` or `tensor`.
        is_dynamic: the scale is computed at run time; else the checkpoint has it.
    """

    format: str
    strategy: str
    is_dynamic: bool = True

    def fields(self) -> dict[str, object]:
        """The arguments of the format."""
        kind = "float" if self.format == "fp8" else "int"
        fields: dict[str, object] = {"num_bits": 8, "type": kind, "strategy": self.strategy, "symmetric": kind == "float"}
        return fields | {"dynamic": self.is_dynamic}

    def __str__(self) -> str:
        """For a sentence: `fixed int8`."""
        return f"{'' if self.is_dynamic else 'fixed '}{'fp8' if self.format == 'fp8' else 'int8'}"


@dataclass(frozen=True)
class LayerScheme:
    """How a layer is quantized."""

    weights: Scheme
    inputs: Inputs | None

    def fields(self) -> dict[str, object]:
        """The group of the format, without its targets."""
        weights = self.weights
        fields: dict[str, object] = {"num_bits": weights.bits, "type": weights.type, "strategy": weights.strategy}
        fields |= {"symmetric": weights.symmetric, "group_size": weights.group}
        inputs: dict[str, object] = {} if self.inputs is None else {"input_activations": self.inputs.fields()}
        return {"weights": fields, **inputs}

    @property
    def has_packed_zero_points(self) -> bool:
        """True if the format packs zero points next to the weight."""
        weights = self.weights
        return weights.type == "int" and not weights.symmetric and weights.strategy != "tensor" and self.inputs is None

    def __str__(self) -> str:
        """For a sentence: `int4 in groups of 32`."""
        weights = self.weights
        form = "fp8" if weights.type == "float" else f"{'' if weights.symmetric else 'u'}int{weights.bits}"
        name = (
            f"{form} per tensor"
            if weights.strategy == "tensor"
            else describe(form, 2 if weights.group else 1, weights.group or 0)
        )
        return name if self.inputs is None else f"{name} with inputs in {self.inputs}"


@dataclass(frozen=True)
class Layer:
    """A quantized layer.

    Attributes:
        dtype: of its dequantized weight.
        input_grid: the scale and the zero point of a fixed quantizer of its input, [].
        is_rounded: its scales are rounded to this dtype.
    """

    scheme: LayerScheme
    stored: StoredBlocks
    dtype: torch.dtype
    input_grid: tuple[torch.Tensor, torch.Tensor] | None = None
    is_rounded: bool = False

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in that dtype."""
        return dequantize(self.stored.q, self.stored.scale, self.stored.zero_point, dtype)


def layers_of(program: Program, weights: Iterable[QuantizedWeight]) -> dict[str, Layer]:
    """The quantized layers by the names of their weights.

    Args:
        weights: of the program.

    Raises:
        UnsupportedError: naming the first that the format cannot say.
    """
    by_name: dict[str, list[QuantizedWeight]] = defaultdict(list)
    for weight in weights:
        by_name[weight.name].append(weight)
    layers: dict[str, Layer] = {}
    for name, reads in by_name.items():
        _check_readers(reads)
        # A table that is looked up and multiplied comes twice.
        products = [user for read in reads for user in read.node.users if user.target is aten.linear.default]
        inputs = {_inputs(product): product for product in products} or {None: None}
        if len(inputs) > 1:
            raise UnsupportedError(f"{program.name} quantizes the inputs of '{name}' in several ways, and the format says one")
        kind, product = next(iter(inputs.items()))
        scheme = _checked(name, LayerScheme(_weights(reads[0]), kind))
        grid = None if product is None or kind is None or kind.is_dynamic else _grid(program, input_of(product))
        layers[name] = Layer(scheme, reads[0].stored, nodes.tensor_type(reads[0].node).dtype, grid)
    _refuse_others(program, {read.node for reads in by_name.values() for read in reads})
    known = {layer.scheme for layer in layers.values()}
    # One group of all inputs is a channel too; the checkpoint has fewer schemes where it is of the size of others' groups.
    by_group = {name: _by_group(layer) for name, layer in layers.items()}
    return {
        name: replace(layer, scheme=scheme) if (scheme := by_group[name]) in known else layer for name, layer in layers.items()
    }


def _by_group(layer: Layer) -> LayerScheme:
    """The scheme of a layer, with groups where it has a scale for each channel."""
    weights = layer.scheme.weights
    if weights.strategy != "channel":
        return layer.scheme
    return replace(layer.scheme, weights=replace(weights, strategy="group", group=layer.stored.q.shape[1]))


def check_loads(schemes: Iterable[LayerScheme]) -> None:
    """Refuse several schemes with packed zero points among them: transformers 5.24 loads no such checkpoint.

    It makes parameters of another shape for packed zero points (compressed-tensors 0.20), unless it dequantizes all layers when
    it loads them, by the first scheme.

    Raises:
        UnsupportedError: naming the schemes.
    """
    kinds = list(dict.fromkeys(schemes))
    if len(kinds) > 1 and any(kind.has_packed_zero_points for kind in kinds):
        raise UnsupportedError(
            f"transformers loads no checkpoint with several schemes ({', '.join(map(str, kinds))}) where one has packed zero "
            f"points, so it could not be compared; choose symmetric=true"
        )


def check_fused(schemes: Mapping[str, LayerScheme], modules: Sequence[str]) -> None:
    """Refuse different schemes for layers that vLLM makes one of. Raises UnsupportedError.

    Args:
        schemes: of quantized layers, by their paths.
        modules: the paths of all linear layers.
    """
    for path in modules:
        parent, _, leaf = path.rpartition(".")
        family = next((family for family in FUSED if family[0] == leaf), ())
        members = [f"{parent}.{part}" for part in family if f"{parent}.{part}" in modules]
        found = {str(schemes.get(member, "floating point")): member for member in reversed(members)}
        if len(found) > 1:
            (one, first), (two, second), *_ = found.items()
            raise UnsupportedError(
                f"'{second}' is in {two} and '{first}' in {one}, and vLLM makes one layer of them, which has one scheme; "
                f"choose the same in schemes= for {', '.join(family)}"
            )


def _check_readers(reads: Sequence[QuantizedWeight]) -> None:
    """Refuse weights of other layers than `nn.Linear`, such as the transposed ones of GPT-2. Raises UnsupportedError."""
    for read in reads:
        is_row = Embedding.of(Dequantize(read.node).q) is not None
        other = next((user for user in read.node.users if user.target is not aten.linear.default), None)
        if other is not None and not is_row:
            raise UnsupportedError(
                f"'{read.name}' is read by '{other.name}', and compressed-tensors quantizes the weights of nn.Linear alone; "
                f"leave it out by skip="
            )


def _inputs(product: fx.Node) -> Inputs | None:
    x = input_of(product)
    if x.target is fake_quantize:
        return Inputs(str(nodes.argument(x, "format")), "tensor", is_dynamic=False)
    if x.target is not fake_quantize_dynamic:
        return None
    return Inputs(str(nodes.argument(x, "format")), str(nodes.argument(x, "granularity")))


def _grid(program: Program, quantizer: fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and the zero point of a fixed quantizer. Raises UnsupportedError where they are not those of a tensor."""
    scale, zero_point = (constant(program, nodes.argument(quantizer, name)) for name in ("scale", "zero_point"))
    if scale is None or scale.numel() != 1 or zero_point is None:
        raise UnsupportedError(
            f"'{quantizer.name}' of {program.name} has no scale and zero point for the whole tensor, and a checkpoint has no "
            f"others for inputs; choose {_CHOICES}"
        )
    return scale.reshape(()), zero_point.reshape(())


def _weights(weight: QuantizedWeight) -> Scheme:
    """The scheme of a weight. Raises UnsupportedError."""
    stored, name = weight.stored, weight.name
    form, scale, zero_point = FORMATS[stored.format], stored.scale, stored.zero_point
    if stored.format not in _WEIGHTS or scale.dtype not in _FLOATS:
        kind = f"{stored.format} with scales in {str(scale.dtype).removeprefix('torch.')}"
        raise UnsupportedError(f"'{name}' is in {kind}, which is not written as compressed-tensors; choose {_CHOICES}")
    if stored.q.dim() != 2:
        raise UnsupportedError(
            f"'{name}' is a stack of matrices, and compressed-tensors has one for a layer; leave it out by skip="
        )
    if zero_point is not None and zero_point.is_floating_point():
        raise UnsupportedError(
            f"'{name}' has minimums in floating point, as GGUF files do, and compressed-tensors has integers"
        )
    if weight.order is not None:
        raise UnsupportedError(f"the inputs of '{name}' are sorted by groups, which compressed-tensors no longer stores")
    (rows, columns), shape = stored.q.shape, tuple(scale.shape)
    strategy = "tensor" if scale.numel() == 1 else "channel" if shape == (rows, 1) else "group"
    if strategy == "group" and (len(shape) != 2 or shape[0] != rows or shape[1] < 1 or columns % shape[1]):
        raise UnsupportedError(
            f"'{name}', [{rows}, {columns}], has scales in the shape {[*shape]}, and compressed-tensors has them for the "
            f"tensor, for rows, or for groups of neighbours in a row; choose granularity=channel or group"
        )
    group = columns // shape[1] if strategy == "group" else None
    return Scheme(form.bits, "int" if form.is_integer else "float", strategy, zero_point is None, group)


def _checked(name: str, scheme: LayerScheme) -> LayerScheme:
    """The scheme where the format has its inputs. Raises UnsupportedError."""
    inputs, weights = scheme.inputs, scheme.weights
    if inputs is None:
        return scheme
    if (inputs.format, inputs.strategy) not in _INPUTS:
        raise UnsupportedError(
            f"the input of '{name}' is quantized to {inputs.format} with a scale per {inputs.strategy}, which servers have no "
            f"kernels for; choose {_CHOICES}"
        )
    if weights.bits != 8 or (weights.type == "float") != (inputs.format == "fp8"):
        raise UnsupportedError(
            f"'{name}' is in {replace(scheme, inputs=None)} and its input in {inputs.format}, a pair that servers have no "
            f"kernels for; choose {_CHOICES}"
        )
    return scheme


def _refuse_others(program: Program, weights: set[fx.Node]) -> None:
    """Refuse quantizers that are no inputs of quantized layers. Raises UnsupportedError."""
    for node in program.nodes(fake_quantize, fake_quantize_dynamic):
        is_input = all(
            user.target is aten.linear.default and user.args[0] is node and user.args[1] in weights for user in node.users
        )
        if not is_input:
            raise UnsupportedError(
                f"{program.name} quantizes '{node.name}', which is not the input of a quantized linear layer, and a "
                f"compressed-tensors checkpoint says no other; choose {_CHOICES}"
            )
