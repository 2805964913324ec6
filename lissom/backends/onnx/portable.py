"""ONNX files for runtimes elsewhere: one file, standard operators, and the oldest opset that they allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import torch

from lissom.backends.exported import kind_and_reason, leaves_of
from lissom.backends.onnx.export import export_onnx, input_names, output_names, results_of
from lissom.backends.onnx.translation import OPSET
from lissom.backends.onnx.variants import INTEGERS, RMS_NORMS, write_variant
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.errors import UnsupportedError

_OLDEST = 18
"""The oldest opset that PyTorch's exporter writes for."""
_IR_VERSION = 10
"""The version of the file format, of 2024, which has integers of four bits."""
_LARGEST = 1_900_000_000
"""Bytes of weights in one file; protocol buffers end at 2 GiB."""


class PlainSession:
    """An ONNX file opened by ONNX Runtime with its default options, as another program opens it; called with flat inputs."""

    def __init__(self, program: Program, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs, self._outputs = input_names(program), output_names(program)
        places: dict[object, int] = {result: index for index, result in enumerate(results_of(program))}
        self._leaves = [(places.get(leaf), leaf) for leaf in leaves_of(program)]

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[object]:
        given = {name: tensor.detach().numpy() for name, tensor in zip(self._inputs, inputs, strict=True)}
        kept = {argument.name for argument in self.session.get_inputs()}
        outputs = self.session.run(self._outputs, {name: array for name, array in given.items() if name in kept})
        return [leaf if place is None else torch.from_numpy(outputs[place]) for place, leaf in self._leaves]


def portable_model(program: Program, example: Sample, *, contrib: bool = False) -> ir.Model:
    """The program in plain operators, quantized layers in integers.

    Args:
        contrib: with operators of ONNX Runtime's domain `com.microsoft`, which are faster for some quantized layers.
    """
    try:
        exported = export_onnx(program, example, decompose=False)
    # The exporter's errors have no common class; with decompositions it translates more operators.
    except Exception:
        exported = export_onnx(program, example, decompose=True)
    return write_variant(exported, [INTEGERS, RMS_NORMS], standard=not contrib)[0]


def save_portable(model: ir.Model, path: Path) -> int:
    """Write a model to one file, and weights too large for it to a second one, NAME.onnx_data; returns the opset.

    The opset is the oldest one in which the model is valid as it is.

    Raises:
        UnsupportedError: if there is none.
    """
    large = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value) > _LARGEST
    reason = ""
    for opset in range(_OLDEST, OPSET + 1):
        model.opset_imports[""] = opset
        model.ir_version = _IR_VERSION
        ir.save(model, path, external_data=f"{path.name}_data" if large else None)
        try:
            onnx.checker.check_model(path, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            reason = kind_and_reason(error)
            continue
        return opset
    raise UnsupportedError(f"'{path.name}' is valid ONNX in no opset from {_OLDEST} to {OPSET}: {reason}; choose another dtype")
