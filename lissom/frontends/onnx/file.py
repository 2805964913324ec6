"""Reading and checking ONNX files: the result is a graph that follows the ONNX standard, or an error of one sentence.

No file outside the ONNX file's folder is opened. ONNX's own checker and shape inference refuse operators, attributes, axes and
shapes that the standard does not allow.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TypeVar

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, Message
from onnx_ir.passes import common
from onnx_ir.passes.common import _c_api_utils

from lissom.errors import ArtifactError

UNKNOWN = "lissom.unknown"
"""A domain without operators."""
MOST_NODES = 200_000
"""The most nodes of a graph after inlining its functions."""
_SMALL = 1000
"""The largest external tensor that is read at once, in bytes; larger ones are mapped when needed."""
_ALLOWED: Mapping[str, Collection[object]] = {
    **dict.fromkeys(
        (
            *("allowzero", "ceil_mode", "count_include_pad", "exclusive", "is_causal", "keepdims", "largest"),
            *("linear_before_reset", "noop_with_empty_axes", "reverse", "select_last_index", "sorted", "storage_order"),
            *("transA", "transB", "upper"),
        ),
        (0, 1),
    ),
    "approximate": (b"none", b"tanh"),
    "auto_pad": (b"NOTSET", b"SAME_UPPER", b"SAME_LOWER", b"VALID"),
    "reduction": (b"none", b"add", b"mul", b"max", b"min", b"mean", b"sum"),
}
"""The allowed values of attributes, which the checker does not check."""
Part = TypeVar("Part", bound=Message)
_INFERENCE = re.compile(r"\(op_type:(?P<kind>\w+)(?:, node name: (?P<name>.*?))?\): (?:\[\w+\] )*(?P<reason>.*)")


def read_proto(path: Path) -> onnx.ModelProto:
    """The unchecked ModelProto in a file. Raises ArtifactError if there is none."""
    if not path.is_file():
        raise ArtifactError(f"{path} is not a file; give the path of an ONNX file")
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise ArtifactError(f"{path} is not an ONNX file: {type(error).__name__}: {one_line(error)}") from error
    if not proto.graph.output or not proto.opset_import:
        raise ArtifactError(f"{path} is not an ONNX file: it holds no graph with outputs")
    return proto


def read_file(path: Path) -> ir.Model:
    """The model in a file. Raises ArtifactError if there is none, or it does not follow the standard."""
    proto = read_proto(path)
    folder = path.absolute().parent
    _bring_in(proto, path, folder)
    twice = next(
        (name for name, count in Counter(initializer.name for initializer in proto.graph.initializer).items() if count > 1),
        None,
    )
    if twice is not None:
        raise ArtifactError(f"{path} is not a valid ONNX file: it holds two initializers '{twice}'; export the model again")
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, folder)
    model.graph.sort()
    _c_api_utils.call_onnx_api(lambda light: _check(light, path), model)
    return model


def one_line(error: BaseException) -> str:
    """An error's message in one line of at most 300 characters."""
    text = "; ".join(line.strip() for line in str(error).replace("==> Context:", "").splitlines() if line.strip())
    return text if len(text) <= 300 else f"{text[:297]}..."


def root_line(error: BaseException) -> str:
    """The type and message of an error's root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {one_line(error)}"


def _bring_in(proto: onnx.ModelProto, path: Path, folder: Path) -> None:
    """Check all external data, and read small tensors and those that are not initializers of the main graph."""
    initializers = list(proto.graph.initializer)
    large = {id(tensor) for tensor in initializers}
    for tensor in parts_of(proto, onnx.TensorProto):
        if not is_external(tensor):
            if tensor.raw_data and len(tensor.raw_data) != _bytes_of(tensor, f"{path} holds {tensor.name!r}"):
                raise ArtifactError(
                    f"{path} holds {tensor.name!r} of {list(tensor.dims)} elements in {len(tensor.raw_data)} bytes; "
                    f"the file is damaged"
                )
            continue
        file, offset, length = external_place(tensor, path, folder)
        if length > _SMALL and id(tensor) in large:
            continue
        with file.open("rb") as opened:
            opened.seek(offset)
            data = opened.read(length)
        del tensor.external_data[:]
        tensor.data_location, tensor.raw_data = onnx.TensorProto.DEFAULT, data


def parts_of(message: Message, kind: type[Part]) -> Iterator[Part]:
    """Every message of one type, such as tensors, nested in a message: in graphs, attributes and functions."""
    if isinstance(message, kind):
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for nested in [value] if isinstance(value, Message) else value:
                yield from parts_of(nested, kind)


def is_external(tensor: onnx.TensorProto) -> bool:
    """True when the elements are in another file."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL or bool(tensor.external_data)


def external_place(tensor: onnx.TensorProto, path: Path, folder: Path) -> tuple[Path, int, int]:
    """The file, offset and length in bytes of external data. Raises ArtifactError."""
    given = {entry.key: entry.value for entry in tensor.external_data}
    location = given.get("location", "")
    where = f"{path} keeps {tensor.name!r} in the file {location}"
    file = folder / location
    relative = PurePosixPath(location)
    plain = location and "\0" not in location and not relative.is_absolute() and ".." not in relative.parts
    if not plain or file.resolve() != folder.resolve() / relative:
        raise ArtifactError(f"{where}, which is not inside of its folder, or is a link; copy the data into the folder itself")
    if not file.is_file():
        raise ArtifactError(f"{where}, which is not there; put it next to the ONNX file")
    needed, size = _bytes_of(tensor, where), file.stat().st_size
    try:
        offset, length = (int(given.get(key, default)) for key, default in (("offset", 0), ("length", needed)))
    except ValueError as error:
        raise ArtifactError(f"{where}, and its offset or length is not a number; export the model again") from error
    if length != needed or offset < 0 or offset + length > size:
        raise ArtifactError(
            f"{where}, {length} bytes from {offset} of {size}, where {list(tensor.dims)} elements are {needed} bytes; "
            f"the files are damaged, or do not belong together"
        )
    return file, offset, length


def _bytes_of(tensor: onnx.TensorProto, where: str) -> int:
    """The size of a tensor's elements in bytes. Raises ArtifactError."""
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"{where}, whose elements are of no fixed width: {one_line(error)}; export the model again"
        ) from error
    if any(dim < 0 for dim in tensor.dims):
        raise ArtifactError(f"{where}, whose sizes are {list(tensor.dims)}; export the model again")
    return -(-math.prod(tensor.dims) * bits // 8)


def _check(light: onnx.ModelProto, path: Path) -> None:
    """Check a model whose large initializers are inputs; modifies the model. Raises ArtifactError."""
    for number, node in enumerate(light.graph.node):
        node.name = node.name or f"number {number + 1}"
    outputs = [output for output in light.graph.output if output.type.HasField("tensor_type")]
    for output in outputs:
        # The checker requires a shape, even an empty one, and many files lack it.
        output.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(light)
        _check_values(light)
        _check_calls(light)
        # The file's shapes of intermediate values may be more precise than inference; the rewrites use them.
        del light.graph.value_info[:]
        for output in outputs:
            output.type.tensor_type.ClearField("shape")
        _hide_slices(light)
        onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=True, data_prop=True)
    except onnx.checker.ValidationError as error:
        raise ArtifactError(f"{path} is not a valid ONNX file: {one_line(error)}; export the model again") from error
    except onnx.shape_inference.InferenceError as error:
        match = _INFERENCE.search(str(error))
        said = f"{match['kind']} '{match['name'] or ''}': {match['reason']}" if match else one_line(error)
        raise ArtifactError(f"{path} is not a valid ONNX file: {said}; export the model again") from error


def _hide_slices(light: onnx.ModelProto) -> None:
    """Move Slice nodes to a domain unknown to shape inference, which aborts the process at a negative size."""
    for holder in (light, *light.functions):
        holder.opset_import.append(onnx.helper.make_opsetid(UNKNOWN, 1))
    for node in parts_of(light, onnx.NodeProto):
        if node.op_type == "Slice":
            node.domain = UNKNOWN


def infer_shapes(model: ir.Model) -> None:
    """Set the shapes of values by ONNX's shape inference; values after a Slice keep the shapes in the file."""
    slices = {node: node.domain for node in model.graph.all_nodes() if node.op_type == "Slice"}
    for node in slices:
        node.domain = UNKNOWN
    model.opset_imports[UNKNOWN] = 1
    common.ShapeInferencePass()(model)
    del model.opset_imports[UNKNOWN]
    for node, domain in slices.items():
        node.domain = domain


def _check_values(light: onnx.ModelProto) -> None:
    """Refuse attribute values that the standard does not have. Raises ValidationError naming the node."""
    for node in parts_of(light, onnx.NodeProto):
        for option in node.attribute if node.domain in ("", "ai.onnx") else ():
            if option.ref_attr_name or option.name not in _ALLOWED:
                continue
            value = onnx.helper.get_attribute_value(option)
            if value not in _ALLOWED[option.name]:
                allowed = ", ".join(str(known) for known in _ALLOWED[option.name])
                raise onnx.checker.ValidationError(
                    f"{node.op_type} {node.name!r} has the attribute {option.name} of {value}, and the standard has {allowed}"
                )


def _check_calls(light: onnx.ModelProto) -> None:
    """Refuse functions that inline to too many nodes; the checker has refused cycles, and calls that are too deep.

    Raises:
        ValidationError: if there is one.
    """
    functions = {(function.domain, function.name): function for function in light.functions}
    sizes: dict[tuple[str, str], int] = {}

    def count(nodes: Iterable[onnx.NodeProto]) -> int:
        """The number of nodes after inlining every function."""
        total = 0
        for node in nodes:
            called = (node.domain, node.op_type)
            if called in functions and called not in sizes:
                sizes[called] = count(functions[called].node)
            total += sizes.get(called, 1)
            total += sum(count(attribute.g.node) for attribute in node.attribute if attribute.HasField("g"))
        return total

    total = count(light.graph.node)
    if total > MOST_NODES:
        raise onnx.checker.ValidationError(f"it has {total} nodes once its functions are written out, of {MOST_NODES} at most")
