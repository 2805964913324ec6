"""The table of engines in the comparison, each at its best setting."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lissom import api
from lissom.cli.bench.workload import Array, Inputs, Model
from lissom.errors import UnsupportedError, nearest
from lissom.frontends.capture.isolation import exchanged
from lissom.frontends.models.huggingface import find_directory


@dataclass(frozen=True)
class Task:
    """The input of an engine.

    Attributes:
        calibration: inputs of real texts, one row each; may be empty.
        folder: for the engine's files, deleted afterwards.
    """

    model: Model
    calibration: Sequence[Inputs]
    threads: int
    folder: Path


Call = Callable[[], object]
Build = Callable[[Inputs], Call]
"""Compiles for the shape of the inputs, and returns a function that computes the outputs."""
Prepare = Callable[[Task], Build]
"""The preparation for all shapes: export, quantization."""


@dataclass(frozen=True)
class Engine:
    """One way to run a model.

    Attributes:
        name: on the command line.
        title: in tables.
        packages: required ones, by the names they are imported and installed under.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    prepare: Prepare

    @property
    def missing(self) -> str | None:
        """A sentence if required packages are not installed, else None."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"needs {' and '.join(absent)}: pip install 'lissom[bench]'" if absent else None


def eager(task: Task) -> Build:
    """PyTorch eager."""
    return lambda inputs: _inference(partial(task.model, inputs))


def torch_compile(task: Task, *, dtype: torch.dtype) -> Build:
    """TorchInductor with frozen weights, one compile per shape."""
    return _inductor(task.model, dtype)


def torchao_int8(task: Task) -> Build:
    """torchao: per-channel int8 weights and per-token int8 activations; then TorchInductor, with the rest in float32."""
    quantization = import_module("torchao.quantization")
    # Without it there are no int8 products on a CPU (ao#4823).
    import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantization.quantize_(task.model.source.model, quantization.Int8DynamicActivationInt8WeightConfig())
    return _inductor(task.model, torch.float32)


def _inductor(model: Model, dtype: torch.dtype) -> Build:
    config: Any = import_module("torch._inductor.config")
    module = model.source.model.to(dtype) if dtype is not torch.float32 else model.source.model

    def build(inputs: Inputs) -> Call:
        torch.compiler.reset()
        compiled = torch.compile(module, dynamic=False)
        typed = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        call = _inference(partial(compiled, **typed, **model.constants))
        # It compiles at the first call.
        with config.patch(freezing=True):
            call()
        return call

    return build


def _inference(call: Call) -> Call:
    def without_gradients() -> object:
        with torch.inference_mode():
            return call()

    return without_gradients


def onnxruntime(task: Task, *, int8: bool) -> Build:
    """ONNX Runtime on an export of opset 17.

    Args:
        int8: per-channel weights, dynamically quantized activations.
    """
    file = _export(task)
    runtime = import_module("onnxruntime")
    if int8:
        quantization = import_module("onnxruntime.quantization")
        quantized = file.with_name("int8.onnx")
        quantization.quantize_dynamic(file, quantized, per_channel=True, weight_type=quantization.QuantType.QInt8)
        file = quantized
    options = runtime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = {argument.name for argument in session.get_inputs()}
    return lambda inputs: partial(session.run, None, {name: x.numpy() for name, x in inputs.items() if name in names})


class _Answer(nn.Module):
    """The model with positional tensor inputs, returning only the tensor that is compared."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.module = model.source.model
        self.names = tuple(model.example)
        self.constants = dict(model.constants)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        outputs = self.module(**dict(zip(self.names, tensors, strict=True)), **self.constants)
        return next(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())


def _export(task: Task) -> Path:
    """The model as an ONNX file with dynamic batch and, for inputs with two dimensions, dynamic sequence."""
    file = task.folder / "model.onnx"
    example = task.model.example
    free = {name: {0: "batch", 1: "sequence"} if x.dim() == 2 else {0: "batch"} for name, x in example.items()}
    options: dict[str, Any] = {"input_names": list(example), "output_names": ["answer"], "dynamic_axes": free}
    torch.onnx.export(_Answer(task.model), tuple(example.values()), file, opset_version=17, dynamo=False, **options)
    return file


def openvino(task: Task, *, precision: str, quantize: Callable[[Any, Sequence[Inputs]], Any] | None = None) -> Build:
    """OpenVINO for latency, one compile per shape.

    Args:
        precision: of the operators that are not int8.
        quantize: gives a quantized model from OpenVINO's and the task's calibration inputs.
    """
    # If this package is importable, OpenVINO reports its import over the network.
    sys.modules.setdefault("openvino_telemetry", cast(ModuleType, None))
    runtime = import_module("openvino")
    converted = runtime.convert_model(_export(task))
    if quantize is not None:
        converted = quantize(converted, task.calibration)
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": task.threads, "INFERENCE_PRECISION_HINT": precision}

    def build(inputs: Inputs) -> Call:
        fixed = converted.clone()
        feed = openvino_feed(fixed, inputs)
        fixed.reshape({name: list(x.shape) for name, x in feed.items()})
        request = runtime.compile_model(fixed, "CPU", options).create_infer_request()
        return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]

    return build


def openvino_feed(model: Any, inputs: Inputs) -> dict[str, Array]:
    """The inputs that a model of OpenVINO takes."""
    names = {port.get_any_name() for port in model.inputs}
    return {name: x.numpy() for name, x in inputs.items() if name in names}


def nncf_int8(model: Any, calibration: Sequence[Inputs]) -> Any:
    """int8 by NNCF, with its schemes for transformers. Raises UnsupportedError without calibration inputs."""
    if not calibration:
        raise UnsupportedError("it calibrates on texts; give some with --texts")
    nncf = import_module("nncf")
    rows = [openvino_feed(model, inputs) for inputs in calibration]
    return nncf.quantize(model, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))


def ctranslate2(task: Task, *, compute_type: str) -> Build:
    """CTranslate2's encoder, converted from the checkpoint's directory."""
    checkpoint = task.model.source.checkpoint
    if checkpoint is None or "input_ids" not in task.model.example:
        raise UnsupportedError("it takes encoders of text from a checkpoint directory")
    runtime = import_module("ctranslate2")
    directory, folder = str(find_directory(task.model.name)), str(task.folder / "ctranslate2")
    converter = import_module("ctranslate2.converters").TransformersConverter(directory)
    # It reads a setting that configurations no longer have in transformers 5.
    config = import_module("transformers").PreTrainedConfig
    with exchanged(config, "position_embedding_type", "absolute"):
        converter.convert(folder, quantization=compute_type)
    encoder = runtime.Encoder(folder, device="cpu", compute_type=compute_type, intra_threads=task.threads, inter_threads=1)

    def build(inputs: Inputs) -> Call:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        lengths = [ids.shape[1]] * ids.shape[0] if mask is None else mask.sum(1).tolist()
        padded = runtime.StorageView.from_array(ids.to(torch.int32).numpy())
        real = runtime.StorageView.from_array(np.array(lengths, dtype=np.int32))
        return lambda: np.array(encoder.forward_batch(padded, real).last_hidden_state)

    return build


def lissom(task: Task, *, passes: str = "exact", backend: str = "eager") -> Build:
    """Lissom on the backends eager or onnxruntime: one compile for all shapes; calibration on 100 texts."""
    model, constants = task.model, dict(task.model.constants)
    data = [inputs | constants for inputs in task.calibration] if "int8-static" in passes else []
    compiled = api.compile(model.source.model, model.example | constants, passes=passes, backend=backend, data=data, goal=None)
    return lambda inputs: partial(compiled, **inputs, **model.constants)


def lissom_inductor(task: Task) -> Build:
    """Lissom on the backend inductor: one compile per shape."""
    model = task.model

    def build(inputs: Inputs) -> Call:
        given = inputs | dict(model.constants)
        call = partial(api.compile(model.source.model, given, backend="inductor", dynamic=False), **given)
        # It may compile at the first call.
        call()
        return call

    return build


_EXPORT = ("onnx", "onnxruntime")
_TABLE = (
    Engine("eager", "PyTorch eager fp32", (), eager),
    Engine("torch-compile", "torch.compile fp32", (), partial(torch_compile, dtype=torch.float32)),
    Engine("torch-compile-bf16", "torch.compile bf16", (), partial(torch_compile, dtype=torch.bfloat16)),
    Engine("torchao-int8", "torchao int8 + torch.compile", ("torchao",), torchao_int8),
    Engine("onnxruntime", "ONNX Runtime fp32", _EXPORT, partial(onnxruntime, int8=False)),
    Engine("onnxruntime-int8", "ONNX Runtime int8", _EXPORT, partial(onnxruntime, int8=True)),
    Engine("openvino", "OpenVINO fp32", ("openvino", "onnx"), partial(openvino, precision="f32")),
    Engine("openvino-bf16", "OpenVINO bf16", ("openvino", "onnx"), partial(openvino, precision="bf16")),
    Engine(
        "openvino-int8",
        "OpenVINO int8 (NNCF)",
        ("openvino", "nncf", "onnx"),
        partial(openvino, precision="bf16", quantize=nncf_int8),
    ),
    Engine("ctranslate2", "CTranslate2 fp32", ("ctranslate2",), partial(ctranslate2, compute_type="float32")),
    Engine("ctranslate2-int8", "CTranslate2 int8", ("ctranslate2",), partial(ctranslate2, compute_type="int8")),
    Engine("lissom", "Lissom fp32", (), lissom),
    Engine("lissom-bf16", "Lissom bf16", (), partial(lissom, passes="cast{dtype=bf16}")),
    Engine("lissom-int8", "Lissom int8, bf16 rest", (), partial(lissom, passes="cast{dtype=bf16},quantize")),
    Engine("lissom-int8-fp32", "Lissom int8, fp32 rest", (), partial(lissom, passes="quantize")),
    Engine("lissom-packed", "Lissom fp32, padding left out", (), partial(lissom, passes="zero-padding,pack-tokens")),
    Engine("lissom-onnxruntime", "Lissom fp32 on ONNX Runtime", _EXPORT, partial(lissom, backend="onnxruntime")),
    Engine(
        "lissom-onnxruntime-int8",
        "Lissom int8 per-token on ONNX Runtime",
        _EXPORT,
        partial(lissom, passes="quantize{scheme=int8-dynamic}", backend="onnxruntime"),
    ),
    Engine(
        "lissom-onnxruntime-int8-tensor",
        "Lissom int8 per-tensor on ONNX Runtime",
        _EXPORT,
        partial(lissom, passes="quantize{scheme=int8-dynamic,activations=tensor}", backend="onnxruntime"),
    ),
    Engine(
        "lissom-onnxruntime-int8-static",
        "Lissom int8 calibrated on ONNX Runtime",
        _EXPORT,
        partial(lissom, passes="quantize{scheme=int8-static}", backend="onnxruntime"),
    ),
    Engine("lissom-inductor", "Lissom fp32 on inductor", (), lissom_inductor),
)
ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in _TABLE}


def find_engines(names: str) -> tuple[Engine, ...]:
    """The engines of a list such as `eager,lissom`, in the order of the table.

    Raises:
        UnsupportedError: for an unknown name.
    """
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in ENGINES:
            raise UnsupportedError(f"there is no engine '{name}'{nearest(name, ENGINES) or ';'} choose {', '.join(ENGINES)}")
    return tuple(engine for engine in _TABLE if engine.name in wanted)
