"""The graph of an ONNX file, made ready for conversion; every change is exact.

Functions are inlined, constants become initializers, identities go, and a product with a matrix of weights, with the bias added
after it, becomes one `Linear` whose weight is stored [out, in], as PyTorch has it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import onnx_ir as ir
import torch
from onnx_ir.passes import common

from lissom.compiler.errors import ArtifactError, UnsupportedError
from lissom.frontends import onnx_operators

_TRANSPOSED = "transposed"
_PLACE = "place"
_SCOPES = "pkg.torch.onnx.name_scopes"
_TRACE = "pkg.torch.onnx.stack_trace"
_FRAME = re.compile(r'( *File "([^"]+)", line \d+, in .*\n\s*.*)')


def load(path: Path) -> ir.Model:
    """The model in the file, with every node's place in the file noted, and weights read when they are asked for.

    Raises: ArtifactError when there is no such file, it is no ONNX, or its external data is missing.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is no file; give the path of an ONNX file")
    try:
        model = ir.load(path)
    except Exception as error:
        raise ArtifactError(f"{path} is not an ONNX file: {type(error).__name__}: {error}") from error
    if not model.graph.outputs or not model.opset_imports:
        raise ArtifactError(f"{path} is not an ONNX file: it holds no graph with outputs")
    for index, node in enumerate(model.graph):
        node.meta[_PLACE] = index + 1
    for value in _initializers(model):
        data = value.const_value
        if isinstance(data, ir.ExternalTensor) and not Path(data.path).is_file():
            raise ArtifactError(
                f"{path} keeps '{value.name}' in the file {data.location}, which is not there; put it beside the ONNX file"
            )
    return model


def simplify(model: ir.Model) -> None:
    """Bring the graph into the form that is converted, in place."""
    common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    common.RemoveInitializersFromInputsPass()(model)
    common.IdentityEliminationPass()(model)
    common.NameFixPass()(model)
    opset = model.opset_imports.get("", 1)
    transposed: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.domain in ("", "ai.onnx") and node.op_type in ("MatMul", "Gemm"):
            _to_linear(model.graph, node, transposed)
    common.RemoveUnusedNodesPass()(model)
    for node in all_nodes(model):
        used = sum(bool(output.uses()) or output.is_graph_output() for output in node.outputs)
        if onnx_operators.is_ours(node.op_type, node.domain, opset) and used <= 1:
            node.domain = onnx_operators.DOMAIN
    model.opset_imports[onnx_operators.DOMAIN] = 1


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """The nodes of the graph and of the graphs in it."""
    return iter(ir.traversal.RecursiveGraphIterator(model.graph))


def check_operators(model: ir.Model, path: Path) -> None:
    """Refuse operators that have no conversion.

    Raises: UnsupportedError naming each with the first node that uses it.
    """
    from onnx2fx import is_supported

    missing: dict[str, str] = {}
    for node in all_nodes(model):
        opset = model.opset_imports.get(node.domain, 1)
        if not is_supported(node.op_type, node.domain, opset):
            full = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
            missing.setdefault(f"{full} (opset {opset})", f"node '{node.name}'")
    if missing:
        found = ", ".join(f"{operator} in {node}" for operator, node in missing.items())
        raise UnsupportedError(
            f"{path} cannot be converted: there is no conversion of {found}; export the model again with standard ONNX "
            f"operators, opset 17 to 23"
        )


def take_weights(model: ir.Model) -> dict[str, tuple[str, torch.Tensor]]:
    """Make every floating-point initializer an input of the graph: the input's name -> the weight's name, and the weight.

    Single numbers and integers stay: conversion wants to see them.
    """
    taken: dict[str, tuple[str, torch.Tensor]] = {}
    names: set[str] = set()
    for index, value in enumerate(list(model.graph.initializers.values())):
        data = cast(ir.TensorProtocol, value.const_value)
        wanted = _unique(_weight_name(value), names)
        del model.graph.initializers[cast(str, value.name)]
        value.name = f"lissom_weight_{index}"
        if data.dtype.is_floating_point() and data.size > 1:
            tensor = _to_torch(data)
            taken[value.name] = (wanted, tensor.t().contiguous() if _TRANSPOSED in value.meta else tensor)
            value.const_value = None
            model.graph.inputs.append(value)
        else:
            taken[value.name] = (wanted, _to_torch(data))
            model.graph.initializers.add(value)
    return taken


def rows_of(model: ir.Model) -> dict[str, int]:
    """For each input that looks up a table of constants, how many rows the table has."""
    rows: dict[str, int] = {}
    for value in model.graph.inputs:
        readers = [use.node for use in value.uses()]
        readers += [use.node for node in readers if node.op_type == "Cast" for use in node.outputs[0].uses()]
        for node in readers:
            table = node.inputs[0]
            if node.op_type == "Gather" and table is not None and table.const_value is not None and table is not value:
                axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                rows[cast(str, value.name)] = int(table.const_value.shape[axis])
    return rows


def origins_of(model: ir.Model, path: Path) -> dict[str, tuple[str, str]]:
    """For each node, by its name, the module it is in and a stack trace.

    The module is the one the exporter recorded, else the folders of the node's name, else that name. The trace is the line of
    the exported model's code, else the node's place in the file.
    """
    return {cast(str, node.name): (module_path(node), _trace(node, path)) for node in all_nodes(model)}


def module_path(node: ir.Node) -> str:
    """The module a node is in, `encoder.layer.0.attention.self.query`."""
    recorded = node.metadata_props.get(_SCOPES)
    if recorded:
        scopes = ast.literal_eval(recorded)
        return str(scopes[-2]) if len(scopes) > 1 else ""
    name = node.name or node.op_type
    folders, _, last = name.strip("/").rpartition("/")
    return (folders or last).replace("/", ".")


def _trace(node: ir.Node, path: Path) -> str:
    frames = _FRAME.findall(node.metadata_props.get(_TRACE, ""))
    own = [text for text, file in frames if "/torch/" not in file.replace("\\", "/")]
    if own:
        return own[-1].strip()
    return f'File "{path.name}", line {node.meta.get(_PLACE, 0)}, in graph\n    {node.op_type} {node.name}'


def _to_linear(graph: ir.Graph, node: ir.Node, transposed: dict[ir.Value, ir.Value]) -> None:
    """Put one `Linear` for a product of `x` with a matrix of weights, and for the addition of a bias that follows."""
    x, matrix, *rest = node.inputs
    weight = _weight(graph, node, matrix, transposed)
    if x is None or weight is None or x.is_initializer():
        return
    old, bias = [node], next(iter(rest), None)
    features = cast(ir.Shape, weight.shape)[0]
    if node.op_type == "Gemm" and bias is not None and not _is_bias(bias, features):
        return
    uses = list(node.outputs[0].uses())
    after = uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None
    if node.op_type == "MatMul" and after is not None and after.op_type == "Add" and after.graph is graph:
        bias = next((item for item in after.inputs if item is not None and _is_bias(item, features)), None)
        old += [after] if bias is not None else []
    new = ir.Node(
        onnx_operators.DOMAIN,
        "Linear",
        [x, weight] if bias is None else [x, weight, bias],
        name=node.name,
        metadata_props=dict(node.metadata_props),
    )
    new.meta[_PLACE] = node.meta.get(_PLACE, 0)
    if not _is_named(weight):
        weight.meta["name"] = _name_of_weight(bias, node)
    result = old[-1].outputs[0]
    new.outputs[0].name = result.name
    ir.convenience.replace_nodes_and_values(graph, old[-1], old, [new], [result], new.outputs)


def _weight(graph: ir.Graph, node: ir.Node, matrix: ir.Value | None, transposed: dict[ir.Value, ir.Value]) -> ir.Value | None:
    """The weight, [out, in], a product multiplies by, or None when it multiplies by something else."""
    options = {name: item.value for name, item in node.attributes.items()}
    plain = options.get("alpha", 1.0) == 1.0 and options.get("beta", 1.0) == 1.0 and not options.get("transA", 0)
    if matrix is None or not plain:
        return None
    if options.get("transB", 0):
        return matrix if _is_matrix(matrix) else None
    producer = matrix.producer()
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        turned = list(producer.attributes["perm"].as_ints()) == [1, 0] if "perm" in producer.attributes else True
        return producer.inputs[0] if turned and _is_matrix(producer.inputs[0]) else None
    if not _is_matrix(matrix):
        return None
    if matrix not in transposed:
        shape = cast(ir.TensorProtocol, matrix.const_value).shape
        new = ir.Value(
            name=f"{matrix.name}_transposed",
            shape=ir.Shape([shape[1], shape[0]]),
            type=matrix.type,
            const_value=matrix.const_value,
        )
        new.meta[_TRANSPOSED] = True
        new.meta["name"] = matrix.name
        graph.initializers.add(new)
        transposed[matrix] = new
    return transposed[matrix]


def _is_matrix(value: ir.Value) -> bool:
    return _is_weight(value, 2)


def _is_bias(value: ir.Value, features: object) -> bool:
    return _is_weight(value, 1) and cast(ir.TensorProtocol, value.const_value).shape[0] == features


def _is_weight(value: ir.Value, rank: int) -> bool:
    data = value.const_value
    return value.is_initializer() and data is not None and len(data.shape) == rank and data.dtype.is_floating_point()


def _is_named(value: ir.Value) -> bool:
    """True for a name an author gave, `query.weight`; false for one an exporter made up, `onnx::MatMul_12` or `val_8`."""
    return str(value.meta.get("name", value.name)).endswith(".weight")


def _name_of_weight(bias: ir.Value | None, node: ir.Node) -> str:
    """A name for a weight that lost its own: its bias's neighbour, else the weight of its module."""
    owner = bias.name.removesuffix(".bias") if bias is not None and bias.name and bias.name.endswith(".bias") else ""
    return f"{owner or module_path(node)}.weight"


def _weight_name(value: ir.Value) -> str:
    """The name as a path of attributes: `/m/Constant_1` is `m.Constant_1`, `onnx::MatMul_12` is `onnx__MatMul_12`."""
    parts = re.split(r"[./]+", str(value.meta.get("name", value.name)).strip("/."))
    return ".".join(re.sub(r"\W", "_", part) for part in parts)


def _unique(name: str, taken: set[str]) -> str:
    """The name, or one with a number behind it, that is neither taken nor a folder of one that is, nor in one."""
    found, count = name, 0
    while any(found == other or found.startswith(f"{other}.") or other.startswith(f"{found}.") for other in taken):
        count += 1
        found = (
            f"{name}_{count}"
            if not any(name.startswith(f"{other}.") for other in taken)
            else f"{name.replace('.', '_')}_{count}"
        )
    taken.add(found)
    return found


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.initializers.values()
    for node in all_nodes(model):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from attribute.as_graph().initializers.values()


def _to_torch(data: ir.TensorProtocol) -> torch.Tensor:
    """A copy of the tensor.

    Raises: UnsupportedError for a dtype PyTorch does not have.
    """
    try:
        dtype = ir.tensor_adapters.to_torch_dtype(data.dtype)
    except (KeyError, ValueError, TypeError) as error:
        raise UnsupportedError(f"weight '{data.name}' is {data.dtype}, which PyTorch has no tensors of") from error
    shape = [int(size) for size in data.shape.numpy()]
    if data.size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data.tobytes()), dtype=dtype).reshape(shape)
