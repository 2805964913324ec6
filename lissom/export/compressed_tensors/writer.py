"""Writes an optimized model as a checkpoint of compressed-tensors, with the integers of the program.

The package compressed-tensors packs the weights and writes the configuration. transformers then loads the checkpoint in a fresh
process: every weight has to be the program's dequantized one, bit for bit, and the outputs are compared with the program's.
What vLLM asks of layers is in its compressed_tensors folder and in marlin_utils.py, github.com/vllm-project/vllm.
"""

from __future__ import annotations

import importlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lissom.artifacts.directory import check_new, write_directory
from lissom.artifacts.model_files import Saveable, write_processors
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.verify.divergence import tolerance_of
from lissom.errors import UnsupportedError
from lissom.export.checkpoint import plain_model
from lissom.export.compressed_tensors.kv_cache import (
    CacheScales,
    KvCache,
    check_kv_cache,
    describe_rounding,
    measure,
    write_scheme,
)
from lissom.export.compressed_tensors.layers import notes, placed, width_multiple
from lissom.export.compressed_tensors.reload import hash_of, reload
from lissom.export.compressed_tensors.schemes import Layer, check_fused, check_loads, layers_of
from lissom.export.fresh_process import arguments_of, error_of, outputs_of
from lissom.export.quantized_weights import in_floating_point, quantized_weights
from lissom.ops.formats import FORMATS
from lissom.ops.quantization import fake_quantize, fake_quantize_dynamic
from lissom.passes.quantize.fold_quantized_weights import FoldQuantizedWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUNDINGS = 4.0
"""The most that outputs may differ where two libraries round inputs as finely, relative to the error of one rounding: a value
that is rounded the other way changes all later ones, so two such errors add up, and the largest of the logits is up to twice as
large for one as for the other."""
_NOT_COMPARED = "not compared: vLLM, which computes in float16 or bfloat16 by kernels of its own"


@dataclass(frozen=True)
class CompressedCheckpoint:
    """The written checkpoint.

    Attributes:
        schemes: the number of layers of each scheme.
        megabytes: of the directory.
        relative_error: of the outputs, as transformers computes them from the checkpoint, to the program's.
        notes: sentences on what differs from the program, and on what servers ask for.
    """

    schemes: Mapping[str, int]
    megabytes: float
    relative_error: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        layers = ", ".join(f"{count} in {name}" for name, count in self.schemes.items())
        return (
            f"{self.megabytes:.1f} MB; layers: {layers}; loaded by transformers in a fresh process, which has the program's "
            f"weights bit for bit, and outputs within {self.relative_error:.1e} relative; {'; '.join(self.notes)}"
        )


def write_compressed(
    program: Program,
    model: PreTrainedModel,
    example: Sample,
    directory: Path,
    tokenizer: Saveable | None = None,
    processor: Saveable | None = None,
    kv_cache: KvCache | None = None,
    data: Sequence[Sample] = (),
) -> CompressedCheckpoint:
    """Write the directory, completely or not at all, after the library loaded it.

    Args:
        program: captured from the model and not lowered.
        example: flat inputs for the comparison.
        kv_cache: writes scales for keys and values in this format.
        data: flat inputs that the scales are measured on; by default the example.

    Raises:
        UnsupportedError: if the format cannot say the program, or compressed-tensors is not installed.
        ArtifactError: if the directory exists, or cannot be written.
    """
    check_new(directory)
    check_kv_cache(kv_cache)
    _check_library(model)
    arguments = _call(program, model, example)
    made = _quantized_model(program, model, example)
    if kv_cache is not None:
        batches = [_call(program, model, sample) for sample in data] or [arguments]
        made = replace(made, cache=measure(made.model, batches, arguments))
    compared: list[_Compared] = []

    def write(folder: Path) -> None:
        _compress(made, folder)
        compared.append(_confirm(program, model, example, folder, made))
        write_processors(folder, str(model.config._name_or_path) or None, tokenizer, processor)

    write_directory(directory, write)
    (found,) = compared
    said = (*made.notes, *found.notes)
    kinds = Counter(str(layer.scheme) for layer in made.layers.values())
    megabytes = sum(file.stat().st_size for file in directory.iterdir()) / 1e6
    return CompressedCheckpoint(dict(kinds.most_common()), megabytes, found.relative_error, (*said, _NOT_COMPARED))


def _call(program: Program, model: nn.Module, sample: Sample) -> dict[str, Any]:
    """The arguments of a call of the model, by name."""
    tensors, options = arguments_of(program, model, sample)
    return {**tensors, **options}


@dataclass(frozen=True)
class _QuantizedModel:
    """A model of transformers, its layers to quantize by their paths, and scales of its keys and values."""

    model: Any
    layers: Mapping[str, Layer]
    notes: tuple[str, ...]
    cache: CacheScales | None = None

    @property
    def rounds_inputs(self) -> bool:
        """True if inputs of layers are quantized too."""
        return any(layer.scheme.inputs is not None for layer in self.layers.values())


def _quantized_model(program: Program, model: PreTrainedModel, example: Sample) -> _QuantizedModel:
    """The model with the dequantized weights of a program. Raises UnsupportedError for what the format cannot say."""
    folded, _ = Pipeline([FoldQuantizedWeights()], [example], checks="structural").run(program)
    found = layers_of(folded, quantized_weights(folded))
    if not found:
        raise UnsupportedError(f"{program.name} has no quantized layers; add quantize to the passes, or call save_pretrained")
    values = {name: weight for name, weight in folded.weights().items() if name not in found}
    values |= {name: in_floating_point(layer.stored).to(layer.dtype) for name, layer in found.items()}
    made = plain_model(values, folded, model, width_multiple(found.values()))
    layers, dense = placed(found, made.names, made.model)
    schemes = {path: layer.scheme for path, layer in layers.items()}
    check_fused(schemes, [path for path, module in made.model.named_modules() if isinstance(module, nn.Linear)])
    check_loads(schemes.values())
    return _QuantizedModel(made.model, layers, tuple(notes(layers, dense, made.padded)))


def _describe_rounding(rounded: float, unrounded: float) -> str:
    """The note on the errors of outputs with inputs of layers as the checkpoint says, and in floating point."""
    return (
        f"transformers rounds inputs of layers by x / scale + zero_point in the model's dtype, and the program by x / scale in "
        f"float32, so values near the middle of two integers may differ by one: outputs differ by "
        f"{rounded:.1e} relative, and by {unrounded:.1e} with inputs in floating point"
    )


def _check_library(model: PreTrainedModel) -> None:
    """Refuse to write what no library can load afterwards. Raises UnsupportedError."""
    try:
        importlib.import_module("compressed_tensors")
    except ImportError as error:
        raise UnsupportedError(
            "writing a compressed-tensors checkpoint needs compressed-tensors, which packs it and loads it again for the "
            "comparison: pip install 'lissom[compressed-tensors]'"
        ) from error
    transformers: Any = importlib.import_module("transformers")
    if getattr(transformers, type(model).__name__, None) is not type(model):
        raise UnsupportedError(
            f"{type(model).__name__} is no class of transformers, so a fresh process cannot load its checkpoint to compare it; "
            f"CompiledModel.save writes it with its program, for lissom.load"
        )


def _compress(made: _QuantizedModel, folder: Path) -> None:
    """Quantize the layers by the package, to the integers that they have, and write the checkpoint."""
    model, layers = made.model, made.layers
    library: Any = importlib.import_module
    quantization, compressors = library("compressed_tensors.quantization"), library("compressed_tensors.compressors")
    targets: dict[object, list[str]] = defaultdict(list)
    for path, layer in layers.items():
        targets[layer.scheme].append(path)
    # vLLM looks for the class of a fused layer before the names of its parts, so several schemes have names only.
    groups = {
        f"group_{index}": {"targets": ["Linear"] if len(targets) == 1 else paths, **layers[paths[0]].scheme.fields()}
        for index, paths in enumerate(targets.values())
    }
    dense = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path not in layers]
    config = quantization.QuantizationConfig.model_validate({"config_groups": groups, "ignore": dense})
    quantization.apply_quantization_config(model, config, show_progress=False)
    for path, layer in layers.items():
        module, stored = model.get_submodule(path), layer.stored
        shape, scale = module.weight_scale.shape, stored.scale.float()
        # In float32 the package finds the same integers again.
        module.weight = _parameter(layer.dequantized(torch.float32))
        module.weight_scale = _parameter(scale.reshape(shape))
        if stored.zero_point is not None:
            module.weight_zero_point = _parameter(_signed(stored.zero_point, stored.format).reshape(shape))
        elif hasattr(module, "weight_zero_point"):
            # Adding 0 would turn -0 of fp8 into 0.
            del module.weight_zero_point
        _fix_input(module, layer)
        compressors.compress_module(module)
        module.weight_scale = _parameter(scale.to(layer.dtype).reshape(shape))
    for path, scales in ({} if made.cache is None else made.cache.scales).items():
        module, dtype = model.get_submodule(path), next(model.parameters()).dtype
        module.k_scale, module.v_scale = (_parameter(scale.to(dtype).reshape(1)) for scale in scales)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    if made.cache is not None:
        write_scheme(folder)


def _fix_input(module: Any, layer: Layer) -> None:
    """Give the module the scale and the zero point of a fixed quantizer of its input."""
    if layer.input_grid is not None:
        assert layer.scheme.inputs is not None
        (scale, zero_point), shape = layer.input_grid, module.input_scale.shape
        # Layers of one input share its scale in the program, and safetensors has no place for that.
        module.input_scale = _parameter(scale.to(layer.dtype).reshape(shape).clone())
        module.input_zero_point = _parameter(_signed(zero_point, layer.scheme.inputs.format).reshape(shape))


def _signed(zero_point: torch.Tensor, format: str) -> torch.Tensor:
    """The zero point of an unsigned format for the signed integers of the checkpoint."""
    return (zero_point.int() - (1 << (FORMATS[format].bits - 1))).to(torch.int8)


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.contiguous(), requires_grad=False)


@dataclass(frozen=True)
class _Compared:
    """The relative error of the checkpoint's outputs, and notes on what rounding changes."""

    relative_error: float
    notes: Sequence[str]


def _confirm(program: Program, model: PreTrainedModel, example: Sample, folder: Path, made: _QuantizedModel) -> _Compared:
    """Load the checkpoint in a fresh process, and compare it. Raises UnsupportedError if it is another model."""
    packed = any(layer.scheme.has_packed_zero_points for layer in made.layers.values())
    attentions = [] if made.cache is None else [*made.cache.scales]
    loaded = reload(program, model, example, folder, [*made.layers], attentions, dequantize=packed)
    differing = [path for path, layer in made.layers.items() if loaded.hashes[path] != hash_of(layer.dequantized(layer.dtype))]
    if differing:
        raise UnsupportedError(
            f"transformers reads other weights from the checkpoint of {program.name} than were written, in {len(differing)} "
            f"layers, '{differing[0]}' first, so it is not written"
        )
    unrounded = program
    if made.rounds_inputs:
        unrounded, _ = Pipeline([_KeepInputs()], [example], checks="off").run(program)
    wanted = outputs_of(unrounded, example)
    error, allowed = error_of(loaded.unrounded, wanted), tolerance_of(program)
    if not error <= allowed:
        raise UnsupportedError(
            f"a compressed-tensors checkpoint of {type(model).__name__} cannot hold this program: loaded by transformers, it "
            f"differs by {error:.2g} relative, allowed {allowed:.2g}; low-rank factors and changed operators are no weights of "
            f"the model"
        )
    said: list[str] = []
    if made.cache is not None:
        said.append(describe_rounding(program, made.cache, loaded.cached, loaded.unrounded))
    if unrounded is program:
        return _Compared(error, said)
    rounded = _checked_rounding(program, example, loaded.outputs, wanted)
    return _Compared(rounded, [_describe_rounding(rounded, error), *said])


def _checked_rounding(
    program: Program, example: Sample, outputs: Sequence[torch.Tensor], unrounded: Sequence[torch.Tensor]
) -> float:
    """The relative error of outputs whose inputs of layers the library rounds. Raises UnsupportedError if it is too large.

    Args:
        outputs: of the library.
        unrounded: those of the program with the inputs of layers in floating point.
    """
    wanted = outputs_of(program, example)
    error, effect = error_of(outputs, wanted), error_of(unrounded, wanted)
    if not error <= _ROUNDINGS * effect + tolerance_of(program):
        raise UnsupportedError(
            f"transformers rounds the inputs of layers of {program.name} otherwise: its outputs differ by {error:.2g} "
            f"relative, and rounding inputs changes them by {effect:.2g}; leave them in floating point, scheme=int8-weight"
        )
    return error


@dataclass(frozen=True)
class _KeepInputs(Approximation):
    """Leaves the inputs of layers in floating point, for a comparison of weights."""

    def run(self, edit: Editor) -> None:
        for node in edit.nodes(fake_quantize, fake_quantize_dynamic):
            if all(user.args[0] is node for user in node.users):  # no weight of a layer
                edit.replace(node, nodes.operand(node))
