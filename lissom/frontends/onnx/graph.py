"""The graph of an ONNX file: reading, checking, extracting weights, and the origins of its nodes."""

from __future__ import annotations

import re
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from lissom.errors import UnsupportedError
from lissom.frontends.onnx import file as onnx_file
from lissom.frontends.onnx import operators

PLACE, KIND, NAME, TRANSPOSED = "place", "kind", "name", "transposed"
"""Metadata keys: of a node its number and operator in the file; of a value the weight's name, and whether to transpose it."""

SCOPES = "pkg.torch.onnx.name_scopes"
_TRACE = "pkg.torch.onnx.stack_trace"
_QUOTED = re.compile(r"'([^'\\]*)'")
_FRAME = re.compile(r'^ *(File "([^"\n]+)", line \d+, in .*\n.*)', re.MULTILINE)


def load(path: Path) -> ir.Model:
    """The model in the file, with every node's position in the file as metadata, and weights read when needed.

    Raises:
        ArtifactError: if there is no such file, or it does not follow the ONNX standard.
    """
    model = onnx_file.read_file(path)
    for index, node in enumerate(model.graph):
        node.meta[PLACE], node.meta[KIND] = index + 1, node.op_type
    return model


def check_operators(model: ir.Model, path: Path) -> None:
    """Refuse operators without a conversion, and those in training mode.

    Raises:
        UnsupportedError: naming each with the first node that uses it.
    """
    from onnx2fx import is_supported

    missing: dict[str, str] = {}
    for node in model.graph.all_nodes():
        if _trains(node):
            raise UnsupportedError(
                f"{path} cannot be converted: node {node.name!r} is a {node.op_type} in training mode; "
                f"export the model again in evaluation mode"
            )
        opset = model.opset_imports.get(node.domain, 1)
        standard = node.domain in ("", "ai.onnx")
        wrong = standard and opset >= operators.WRONG.get(node.op_type, opset + 1)
        if wrong or not is_supported(node.op_type, node.domain, opset):
            full = node.op_type if standard else f"{node.domain}.{node.op_type}"
            missing.setdefault(f"{full} (opset {opset})", f"node {node.name!r}")
    if missing:
        uses = ", ".join(f"{operator} in {node}" for operator, node in missing.items())
        raise UnsupportedError(
            f"{path} cannot be converted: there is no correct conversion of {uses}; export the model again with standard ONNX "
            f"operators, opset 17 to 23"
        )


def _trains(node: ir.Node) -> bool:
    """True if the node does in training what it does not do in inference."""
    if node.op_type == "BatchNormalization":
        mode = node.attributes.get("training_mode")
        return mode is not None and mode.as_int() == 1
    mode = node.inputs[2] if node.op_type == "Dropout" and len(node.inputs) > 2 else None
    return mode is not None and (mode.const_value is None or bool(mode.const_value.numpy().any()))


def take_weights(model: ir.Model) -> dict[str, tuple[str, torch.Tensor]]:
    """Turn every floating-point initializer into an input; returns {input's name: (weight's name, weight)}.

    Scalars and integers stay, because conversion needs their values.
    """
    weights: dict[str, tuple[str, torch.Tensor]] = {}
    names: set[str] = set()
    for index, value in enumerate(list(model.graph.initializers.values())):
        data, wanted = value.const_value, _unique(_weight_name(value), names)
        assert data is not None
        del model.graph.initializers[str(value.name)]
        value.name = f"lissom_weight_{index}"
        if data.dtype.is_floating_point() and data.size > 1:
            tensor = _to_torch(data)
            weights[value.name] = (wanted, tensor.t().contiguous() if TRANSPOSED in value.meta else tensor)
            value.const_value = None
            model.graph.inputs.append(value)
        else:
            weights[value.name] = (wanted, _to_torch(data))
            # The data is read now: conversion does not know the directory of external data.
            value.const_value = ir.Tensor(data.numpy(), name=value.name)
            model.graph.initializers.add(value)
    return weights


def rows_of(model: ir.Model) -> dict[str, int]:
    """For each input that indexes a constant table, the table's number of rows."""
    rows: dict[str, int] = {}
    for value in model.graph.inputs:
        readers = [use.node for use in value.uses()]
        readers += [use.node for node in readers if node.op_type == "Cast" for use in node.outputs[0].uses()]
        for node in readers:
            table = node.inputs[0]
            if node.op_type == "Gather" and table is not None and table.const_value is not None and table is not value:
                axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                rows[str(value.name)] = table.const_value.shape.numpy()[axis]
    return rows


def origins_of(model: ir.Model, path: Path) -> dict[str, tuple[str, str]]:
    """The module path and stack trace of each node, by the node's name.

    The module is the one the exporter recorded, else the path in the node's name, else the whole name. The trace is the line of
    the exported model's code, else the node's position in the file.
    """
    return {str(node.name): (module_path(node), _trace(node, path)) for node in model.graph.all_nodes()}


def is_in_module(node: ir.Node) -> bool:
    """True if the exporter recorded the node's module, or the node's name is a path."""
    return SCOPES in node.metadata_props or "/" in str(node.name).strip("/")


def module_path(node: ir.Node) -> str:
    """The module of a node, `encoder.layer.0.attention.self.query`."""
    scopes = _QUOTED.findall(node.metadata_props.get(SCOPES, ""))
    if scopes:
        return scopes[-2] if len(scopes) > 1 else ""
    name = node.name or node.op_type
    folders, _, last = name.strip("/").rpartition("/")
    return (folders or last).replace("/", ".")


def _trace(node: ir.Node, path: Path) -> str:
    frames = _FRAME.findall(node.metadata_props.get(_TRACE, ""))
    own = [text for text, file in frames if "/torch/" not in file.replace("\\", "/")]
    if own:
        return own[-1].strip()
    return f'File "{path.name}", line {node.meta.get(PLACE, 0)}, in graph\n    {node.meta.get(KIND, node.op_type)} {node.name}'


def _weight_name(value: ir.Value) -> str:
    """The name as a path of attributes: `/m/Constant_1` is `m.Constant_1`, `onnx::MatMul_12` is `onnx__MatMul_12`."""
    parts = re.split(r"[./]+", str(value.meta.get(NAME, value.name)).strip("/."))
    return ".".join(re.sub(r"\W", "_", part) for part in parts)


def _unique(name: str, used: set[str]) -> str:
    """The name, with a number appended if needed, so that it neither equals, contains nor extends the path of a taken name."""
    unique, count = name, 0
    while any(unique == other or unique.startswith(f"{other}.") or other.startswith(f"{unique}.") for other in used):
        count += 1
        extends = any(name.startswith(f"{other}.") for other in used)
        unique = f"{name.replace('.', '_') if extends else name}_{count}"
    used.add(unique)
    return unique


def torch_dtype(dtype: ir.DataType) -> torch.dtype | None:
    """The PyTorch dtype, or None if there is none."""
    try:
        return tensor_adapters.to_torch_dtype(dtype)
    except (KeyError, ValueError, TypeError):
        return None


def _to_torch(data: ir.TensorProtocol) -> torch.Tensor:
    """A copy of the tensor. Raises UnsupportedError for a dtype PyTorch does not have."""
    dtype = torch_dtype(data.dtype)
    if dtype is None:
        raise UnsupportedError(f"weight {data.name!r} is {data.dtype}, which PyTorch has no tensors of")
    shape = list(data.shape.numpy())
    if data.size == 0:
        return torch.empty(shape, dtype=dtype)
    # Bytes in a file may have any value, and PyTorch booleans must be 0 or 1.
    is_bool = dtype is torch.bool
    tensor = torch.frombuffer(bytearray(data.tobytes()), dtype=torch.uint8 if is_bool else dtype).reshape(shape)
    return tensor.ne(0) if is_bool else tensor
