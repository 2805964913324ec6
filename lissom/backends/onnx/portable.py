"""ONNX files for runtimes elsewhere: one file, standard operators, and the oldest opset that they allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from google.protobuf.message import Message

from lissom.backends.exported import kind_and_reason, leaves_of
from lissom.backends.names import input_names, output_names, results_of
from lissom.backends.onnx.export import export_onnx
from lissom.backends.onnx.translation import OPSET
from lissom.backends.onnx.variants import INTEGERS, RMS_NORMS, write_variant
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.errors import UnsupportedError
from lissom.frontends.onnx.file import external_place, is_external, read_proto
from lissom.io.files import copy_bytes

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

    The opset is the oldest one in which the model is valid as it is. The weights are never in memory a second time.

    Raises:
        UnsupportedError: if there is none.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    with TemporaryDirectory(prefix="lissom-", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        data = draft.with_name(f"{path.name}_data")
        ir.save(model, draft, external_data=data.name)
        opset = _set_oldest_opset(draft)
        if size > _LARGEST:
            data.replace(path.with_name(data.name))
            draft.replace(path)
        else:
            _write_inline(draft, path)
    return opset


def _set_oldest_opset(path: Path) -> int:
    """Set the oldest opset in which the model in a file is valid, and return it. Raises UnsupportedError if there is none."""
    proto = read_proto(path)
    proto.ir_version = _IR_VERSION
    standard = next(entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    reason = ""
    for opset in range(_OLDEST, OPSET + 1):
        standard.version = opset
        path.write_bytes(proto.SerializeToString())
        try:
            onnx.checker.check_model(path, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            reason = kind_and_reason(error)
            continue
        return opset
    raise UnsupportedError(f"'{path.name}' is valid ONNX in no opset from {_OLDEST} to {OPSET}: {reason}; choose another dtype")


def _write_inline(source: Path, path: Path) -> None:
    """Write a model with external weights as one file.

    The protocol buffer is written field by field, and the bytes of each weight are copied from file to file: serializing it
    whole would hold the weights twice.
    """
    proto = read_proto(source)
    weights = [tensor for tensor in proto.graph.initializer if is_external(tensor)]
    places = [external_place(tensor, source, source.parent) for tensor in weights]
    plain = [tensor for tensor in proto.graph.initializer if not is_external(tensor)]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(plain)
    heads = list(map(_head_of, weights, places))
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    size = len(graph) + sum(len(head) + length for head, (_, _, length) in zip(heads, places, strict=True))
    with path.open("wb") as target:
        target.write(proto.SerializeToString() + _prefix(onnx.ModelProto, "graph", size) + graph)
        for head, (file, offset, length) in zip(heads, places, strict=True):
            target.write(head)
            with file.open("rb") as data:
                data.seek(offset)
                copy_bytes(data, target, length)


def _head_of(weight: onnx.TensorProto, place: tuple[Path, int, int]) -> bytes:
    """What stands before a weight's bytes in a serialized graph."""
    plain = onnx.TensorProto()
    plain.CopyFrom(weight)
    plain.ClearField("external_data")
    plain.ClearField("data_location")
    head = plain.SerializeToString() + _prefix(onnx.TensorProto, "raw_data", place[2])
    return _prefix(onnx.GraphProto, "initializer", len(head) + place[2]) + head


def _prefix(message: type[Message], field: str, size: int) -> bytes:
    """The tag and the length of a field of bytes or of a message: https://protobuf.dev/programming-guides/encoding."""
    return _varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | 2) + _varint(size)


def _varint(number: int) -> bytes:
    """A number in the protocol buffers' encoding: seven bits a byte, the lowest first."""
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
