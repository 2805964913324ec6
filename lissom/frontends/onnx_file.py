"""An ONNX file, read and checked: whatever it holds becomes a graph that follows the ONNX standard, or one sentence.

Nothing outside of the file's folder is opened. The ONNX checker and shape inference, which run here, refuse operators, attributes,
axes and shapes that the standard does not allow.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, Message
from onnx_ir.passes.common import _c_api_utils

from lissom.compiler.errors import ArtifactError

MOST_NODES, DEEPEST = 200_000, 64
"""Nodes a graph may have once its functions are written out, and how deep functions may call each other."""
_SMALL = 1000
"""Bytes of external data that are read at once; larger tensors are mapped when they are asked for."""
_INFERENCE = re.compile(r"\(op_type:(?P<kind>\w+)(?:, node name: (?P<name>.*?))?\): (?:\[\w+\] )*(?P<reason>.*)")


def read_file(path: Path) -> ir.Model:
    """The model in a file. Raises: ArtifactError when there is none, or it does not follow the standard."""
    if not path.is_file():
        raise ArtifactError(f"{path} is no file; give the path of an ONNX file")
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise ArtifactError(f"{path} is not an ONNX file: {type(error).__name__}: {one_line(error)}") from error
    if not proto.graph.output or not proto.opset_import:
        raise ArtifactError(f"{path} is not an ONNX file: it holds no graph with outputs")
    folder = path.absolute().parent
    _bring_in(proto, path, folder)
    twice = next((name for name, count in Counter(item.name for item in proto.graph.initializer).items() if count > 1), None)
    if twice is not None:
        raise ArtifactError(f"{path} is not a valid ONNX file: it holds two initializers '{twice}'; export the model again")
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, folder)
    model.graph.sort()
    _c_api_utils.call_onnx_api(lambda light: _check(light, path), model)
    return model


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    text = "; ".join(line.strip() for line in str(error).replace("==> Context:", "").splitlines() if line.strip())
    return text if len(text) <= 300 else f"{text[:297]}..."


def root_line(error: BaseException) -> str:
    """The kind of the error at the bottom of another, and what it says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {one_line(error)}"


def _bring_in(proto: onnx.ModelProto, path: Path, folder: Path) -> None:
    """Check all external data, and read what is small or does not belong to an initializer of the graph itself."""
    initializers = list(proto.graph.initializer)
    large = {id(tensor) for tensor in initializers}
    for tensor in _tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL and not tensor.external_data:
            if tensor.raw_data and len(tensor.raw_data) != _bytes_of(tensor, f"{path} holds '{tensor.name}'"):
                raise ArtifactError(
                    f"{path} holds '{tensor.name}' of {list(tensor.dims)} elements in {len(tensor.raw_data)} bytes; "
                    f"the file is damaged"
                )
            continue
        file, offset, length = _place(tensor, path, folder)
        if length > _SMALL and id(tensor) in large:
            continue
        with file.open("rb") as opened:
            opened.seek(offset)
            data = opened.read(length)
        del tensor.external_data[:]
        tensor.data_location, tensor.raw_data = onnx.TensorProto.DEFAULT, data


def _tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor in a message: in graphs, attributes and functions."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in [value] if isinstance(value, Message) else value:
                yield from _tensors(item)


def _place(tensor: onnx.TensorProto, path: Path, folder: Path) -> tuple[Path, int, int]:
    """The file external data is in, its first byte and its length. Raises: ArtifactError."""
    given = {entry.key: entry.value for entry in tensor.external_data}
    location = given.get("location", "")
    where = f"{path} keeps '{tensor.name}' in the file {location}"
    file = folder / location
    relative = PurePosixPath(location)
    plain = location and "\0" not in location and not relative.is_absolute() and ".." not in relative.parts
    if not plain or file.resolve() != folder.resolve() / relative:
        raise ArtifactError(f"{where}, which is not inside of its folder, or is a link; copy the data into the folder itself")
    if not file.is_file():
        raise ArtifactError(f"{where}, which is not there; put it beside the ONNX file")
    needed, size = _bytes_of(tensor, where), file.stat().st_size
    try:
        offset, length = (int(given.get(key, default)) for key, default in (("offset", 0), ("length", needed)))
    except ValueError as error:
        raise ArtifactError(f"{where}, and its offset or length is no number; export the model again") from error
    if length != needed or offset < 0 or offset + length > size:
        raise ArtifactError(
            f"{where}, {length} bytes from {offset} of {size}, where {list(tensor.dims)} elements are {needed} bytes; "
            f"the files are damaged, or do not belong together"
        )
    return file, offset, length


def _bytes_of(tensor: onnx.TensorProto, where: str) -> int:
    """The bytes that the elements of a tensor take. Raises: ArtifactError."""
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{where}, whose elements are of no fixed width: {one_line(error)}; export the model again") from error
    if any(dim < 0 for dim in tensor.dims):
        raise ArtifactError(f"{where}, whose sizes are {list(tensor.dims)}; export the model again")
    return -(-math.prod(tensor.dims) * bits // 8)


def _check(light: onnx.ModelProto, path: Path) -> None:
    """Check a model whose large initializers are inputs; it is changed. Raises: ArtifactError."""
    for number, node in enumerate(light.graph.node):
        node.name = node.name or f"number {number + 1}"
    outputs = [output for output in light.graph.output if output.type.HasField("tensor_type")]
    for output in outputs:
        # The checker wants a shape, whatever it is, and many files lack it.
        output.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(light)
        _check_calls(light)
        # What the file says of shapes in between may be more than can be inferred, and is left to the rewrites.
        del light.graph.value_info[:]
        for output in outputs:
            output.type.tensor_type.ClearField("shape")
        onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=True, data_prop=True)
    except onnx.checker.ValidationError as error:
        raise ArtifactError(f"{path} is not a valid ONNX file: {one_line(error)}; export the model again") from error
    except onnx.shape_inference.InferenceError as error:
        found = _INFERENCE.search(str(error))
        said = f"{found['kind']} '{found['name'] or ''}': {found['reason']}" if found else one_line(error)
        raise ArtifactError(f"{path} is not a valid ONNX file: {said}; export the model again") from error


def _check_calls(light: onnx.ModelProto) -> None:
    """Refuse functions that grow beyond all bounds. Raises: ValidationError. Cycles are refused by the checker, before."""
    functions = {(item.domain, item.name): item for item in light.functions}
    sizes: dict[tuple[str, str], tuple[int, int]] = {}

    def size_of(nodes: Iterable[onnx.NodeProto], depth: int) -> tuple[int, int]:
        """How many nodes there are when every function is written out, and how deep functions call each other."""
        if depth > DEEPEST:
            raise onnx.checker.ValidationError(f"its functions call each other more than {DEEPEST} deep")
        count = deepest = 0
        for node in nodes:
            called = (node.domain, node.op_type)
            if called in functions and called not in sizes:
                sizes[called] = size_of(functions[called].node, depth + 1)
            inner = [sizes[called]] if called in functions else [(1, 0)]
            inner += [size_of(item.g.node, depth) for item in node.attribute if item.HasField("g")]
            count += sum(one for one, _ in inner)
            deepest = max(deepest, *(one + (called in functions) for _, one in inner))
        return count, deepest

    count, deepest = size_of(light.graph.node, 0)
    if count > MOST_NODES or deepest > DEEPEST:
        raise onnx.checker.ValidationError(
            f"its functions hold {count} nodes once written out, {deepest} calls deep; at most {MOST_NODES} and {DEEPEST} are read"
        )
