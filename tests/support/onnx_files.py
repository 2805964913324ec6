"""ONNX files the tests read: models exported by both exporters of PyTorch, and graphs built by hand."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.support.models import Case, normal, seeded

NAMES = ("batch", "sequence")


class First(nn.Module):
    """A model of transformers as the TorchScript exporter takes it: tensors by position in, the first result out."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True)))[0]


def tiny_vit() -> Case:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8
    )
    return Case(seeded(lambda: transformers.ViTForImageClassification(config)), {"pixel_values": normal(2, 3, 32, 32)})


def free(tensor: torch.Tensor) -> dict[int, str]:
    """The dimensions that may vary: batch, and the sequence of tokens."""
    return dict(enumerate(NAMES if tensor.dim() == 2 else NAMES[:1]))


def export(case: Case, path: Path, *, dynamo: bool, opset: int, external_data: bool = False) -> Path:
    """Write the model to a file by one of the exporters, its sizes free where `free` says so."""
    with warnings.catch_warnings():
        # Both exporters, and onnxscript beneath one of them, warn of what they deprecate and of what they trace.
        warnings.simplefilter("ignore")
        if dynamo:
            torch.onnx.export(
                case.model, (), path, kwargs=case.kwargs, dynamo=True, opset_version=opset, verbose=False,
                dynamic_shapes={key: _dims(tensor) for key, tensor in case.kwargs.items()}, external_data=external_data,
            )  # fmt: skip
        else:
            # The exporter puts back the mode it found, and would put a wrapper that trains over a model that does not.
            model = First(case.model, list(case.kwargs)).eval()
            torch.onnx.export(
                model, tuple(case.kwargs.values()), path, dynamo=False, opset_version=opset, input_names=list(case.kwargs),
                dynamic_axes={key: free(tensor) for key, tensor in case.kwargs.items()},
            )  # fmt: skip
    return path


def _dims(tensor: torch.Tensor) -> dict[int, torch.export.Dim]:
    return {index: torch.export.Dim(name) for index, name in free(tensor).items()}


def run(path: Path, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(array) for array in found]


def graph(path: Path, nodes: Sequence[Any], inputs: Mapping[str, Sequence[int | str]], opset: int = 18, **weights: Any) -> Path:
    """Write a graph of float32 inputs whose last node gives the only output, `y`."""
    import onnx
    from onnx import helper, numpy_helper

    float32 = onnx.TensorProto.FLOAT
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, float32, sizes) for name, sizes in inputs.items()],
        [helper.make_tensor_value_info("y", float32, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    domains = {node.domain for node in nodes} - {""}
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=9), path)
    return path
