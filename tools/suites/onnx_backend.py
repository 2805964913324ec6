"""The backend tests of ONNX: one operator each, and a few small models, read by `lissom.from_onnx`."""

from __future__ import annotations

import importlib
import re
import tempfile
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from lissom.errors import ArtifactError, CaptureError, LissomError, UnsupportedError
from lissom.frontends.capture.export import capture
from lissom.frontends.onnx.graph import torch_dtype
from lissom.frontends.onnx.model import read
from tools.suites.known import ONNX
from tools.suites.suite import Item, Record, Report, Suite, counts_by, given
from tools.zoo.check import sentence
from tools.zoo.coverage import cell, table

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
"""The tests that hold their models and data; the others download large models."""
_SMALL = 64
"""The most elements of an input that gives sizes or axes."""


def items(everything: bool) -> list[Item]:
    """All tests, each under the operator of its first node that is no constant."""
    loader = importlib.import_module("onnx.backend.test.loader")
    with warnings.catch_warnings():
        # The expected outputs of a few tests are computed with overflows.
        warnings.simplefilter("ignore")
        tests = {test.name: test for kind in KINDS for test in loader.load_model_tests(kind=kind)}
    return [Item(name, test.kind, partial(given, test)) for name, test in tests.items()]


def check(item: Item, report: Report) -> None:
    """Run one test. report: called with the record after every phase."""
    test = item.build()
    report({"phase": "read"})
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        path, sets = _files(test, Path(folder))
        report({"phase": "run", "operator": _operator(path)})
        record = _run(path, sets, test.rtol, test.atol)
        if record["result"] == "refused" and record["reason"].startswith("CaptureError") and len(sets) == 1:
            path, sets = _with_constants(path, Path(folder) / "constants.onnx", *sets[0])
            record = _run(path, sets, test.rtol, test.atol) | {"constants": True}
        report({"phase": None} | record)


def _with_constants(
    path: Path, changed: Path, inputs: list[Any], outputs: list[Any]
) -> tuple[Path, list[tuple[list[Any], list[Any]]]]:
    """The file with its small integer inputs as initializers, as exporters write sizes and axes; and the other inputs."""
    model, left = onnx.load(path), list[Any]()
    for declared, value in zip(list(model.graph.input), inputs, strict=True):
        array = None if value is None or isinstance(value, (list, onnx.TensorProto)) else np.asarray(value)
        if array is not None and array.dtype.kind in "iub" and array.size <= _SMALL:
            model.graph.initializer.append(numpy_helper.from_array(array, declared.name))
            model.graph.input.remove(declared)
        else:
            left.append(value)
    onnx.save(model, changed)
    return changed, [(left, outputs)]


def _files(test: Any, folder: Path) -> tuple[Path, list[tuple[list[Any], list[Any]]]]:
    """The model's file, and pairs of inputs and expected outputs: arrays, or lists and None for other types."""
    if test.model_dir is None:
        path = folder / "model.onnx"
        onnx.save(test.model, path)
        return path, test.data_sets
    path = Path(test.model_dir) / "model.onnx"
    graph = onnx.load(path).graph
    names = {initializer.name for initializer in graph.initializer}
    inputs = [argument for argument in graph.input if argument.name not in names]
    sets = [
        tuple(
            [_loaded(data / f"{kind}_{index}.pb", value) for index, value in enumerate(values)]
            for kind, values in (("input", inputs), ("output", graph.output))
        )
        for data in sorted(Path(test.model_dir).glob("test_data_set_*"))
    ]
    return path, sets


def _loaded(path: Path, value: onnx.ValueInfoProto) -> Any:
    """The value in a file; None for one that is no tensor."""
    if not value.type.HasField("tensor_type"):
        return None
    tensor = onnx.TensorProto()
    tensor.ParseFromString(path.read_bytes())
    return numpy_helper.to_array(tensor)


def _operator(path: Path) -> str:
    nodes = [node for node in onnx.load(path, load_external_data=False).graph.node if node.op_type != "Constant"]
    return (f"{nodes[0].domain}." if nodes[0].domain else "") + nodes[0].op_type if nodes else "Constant"


def _run(path: Path, sets: Sequence[tuple[list[Any], list[Any]]], rtol: float, atol: float) -> Record:
    """The result of a file on every data set."""
    try:
        model = read(path)
    except (ArtifactError, UnsupportedError) as error:
        return {"result": "refused", "reason": _reason(error, path)}
    except Exception as error:
        return {"result": "failure", "reason": f"read: {sentence(error)}"}
    for inputs, outputs in sets:
        try:
            given = tuple(_tensor(value) for value in inputs)
            program = capture(model.module, given, dynamic=False).program
            actual = program(*given)
        except (CaptureError, UnsupportedError) as error:
            return {"result": "refused", "reason": _reason(error, path)}
        except LissomError as error:
            return {"result": "failure", "reason": sentence(error)}
        except Exception as error:
            return {"result": "failure", "reason": f"run: {sentence(error)}"}
        if reason := _difference(actual if isinstance(actual, (tuple, list)) else [actual], outputs, rtol, atol):
            return {"result": "wrong", "reason": reason}
    return {"result": "passed"}


def _reason(error: Exception, path: Path) -> str:
    return sentence(error).replace(str(path), "the file")


def _tensor(value: Any) -> torch.Tensor:
    """An input as a tensor. Raises: UnsupportedError for a dtype PyTorch does not have."""
    if value is None or isinstance(value, list):
        raise UnsupportedError("sequences and optional values are no tensors")
    array = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
    if array.dtype.kind in "OUS":
        raise UnsupportedError("PyTorch has no tensors of strings")
    tensor = numpy_helper.from_array(array)
    dtype = torch_dtype(importlib.import_module("onnx_ir").DataType(tensor.data_type))
    if dtype is None or len(tensor.raw_data) != array.size * dtype.itemsize:
        raise UnsupportedError(f"PyTorch has no tensors of {array.dtype}")
    data = bytearray(tensor.raw_data)
    return torch.frombuffer(data, dtype=dtype).reshape(array.shape) if data else torch.empty(array.shape, dtype=dtype)


def _difference(actual: Sequence[object], wanted: Sequence[Any], rtol: float, atol: float) -> str:
    """The difference of the outputs from the expected ones, in words; empty if there is none."""
    if len(actual) != len(wanted):
        return f"{len(actual)} outputs, and {len(wanted)} are expected"
    for index, (one, other) in enumerate(zip(actual, wanted, strict=True)):
        if not isinstance(one, torch.Tensor):
            return f"output {index} is a {type(one).__name__}"
        expected = _tensor(other)
        if one.shape != expected.shape or one.dtype != expected.dtype:
            have, want = (f"{list(tensor.shape)} of {tensor.dtype}" for tensor in (one, expected))
            return f"output {index} is {have}, and {want} is expected"
        # Two roundings of a reduced precision may be more than the test allows.
        rounding = 2 * torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0
        # All values that tests hold are exact in float64.
        a, b = (tensor.to(torch.complex128 if tensor.is_complex() else torch.float64) for tensor in (one, expected))
        if not torch.allclose(a, b, rtol=max(rtol, rounding), atol=max(atol, rounding), equal_nan=True):
            return f"output {index} differs by {float((a - b).abs().nan_to_num(posinf=np.inf).max()):.3g}"
    return ""


def details(records: Sequence[Record]) -> str:
    """The refused tests, counted by operator."""
    refused = [record for record in records if record.get("result") == "refused"]
    rows = [[f"`{operator}`", str(count), _kind_of_reason(refused, operator)] for operator, count in counts_by(refused, _name)]
    return table(["operator", "refused tests", "why"], rows)


def _name(record: Record) -> str:
    return record["operator"]


def _kind_of_reason(records: Sequence[Record], operator: str) -> str:
    """The most frequent reason for which tests of an operator are refused, without the file and the advice."""
    reasons = counts_by((record for record in records if record["operator"] == operator), _plain_reason)
    return cell(reasons[0][0])


def _plain_reason(record: Record) -> str:
    reason = re.sub(r"^\w+: ((\w+|the file) cannot be \w+: )?", "", record["reason"])
    return re.sub(r" in node 'node'|\(`(\w+) .*?`\)", r"\1", reason.partition(";")[0].partition(", and a graph has")[0])


def warm() -> None:
    """Import what reads ONNX files, and fill the caches of the capture."""
    importlib.import_module("onnxscript")
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        graph (float[2] x) => (float[2] y) { y = Relu (x) }""")
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / "model.onnx")
        _run(Path(folder) / "model.onnx", [([np.ones(2, np.float32)], [np.ones(2, np.float32)])], 0.0, 0.0)


SUITE = Suite(
    title="ONNX backend tests",
    introduction="""\
The tests of `onnx.backend.test` that need no download: every operator of the standard on small inputs, and models that PyTorch
exported. Each file is read by `lissom.from_onnx`, captured, and run; the outputs are compared with those of the test. Where a
size or an axis is an input, it becomes an initializer, as exporters write it.
""",
    noun="tests",
    items=items,
    check=check,
    warm=warm,
    results={
        "passed": "the outputs are as expected",
        "refused": "Lissom refuses the file and says why",
        "failure": "an error that is no refusal",
        "wrong": "other outputs",
    },
    faults=frozenset({"failure", "wrong"}),
    known=ONNX,
    details=details,
    block=100,
)
