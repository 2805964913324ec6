"""Exact rewrites of an ONNX graph before conversion, towards the operators of the original PyTorch code.

Functions are inlined, constants become initializers, identities are removed. A matrix product with a weight, and the bias added
after it, become one `Linear` whose weight is stored [out, in], as in PyTorch. Operators that exporters decompose are
recomposed.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from lissom.frontends.onnx import operators
from lissom.frontends.onnx.file import infer_shapes
from lissom.frontends.onnx.graph import KIND, NAME, PLACE, TRANSPOSED, is_in_module, module_path

_LEARNED = {
    ("Linear", 2): "bias",
    ("Conv", 2): "bias",
    ("LayerNormalization", 1): "weight",
    ("LayerNormalization", 2): "bias",
    ("RMSNormalization", 1): "weight",
}
"""The inputs of operators that are weight vectors, with their names in PyTorch's modules."""


def simplify(model: ir.Model) -> None:
    """Rewrite the graph in place into the form that is converted."""
    common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    common.RemoveInitializersFromInputsPass()(model)
    common.IdentityEliminationPass()(model)
    common.NameFixPass()(model)
    infer_shapes(model)
    opset = model.opset_imports.get("") or model.opset_imports.get("ai.onnx", 1)
    transposed: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.domain not in ("", "ai.onnx") or node.graph is None:
            continue
        if node.op_type in ("MatMul", "Gemm"):
            _to_linear(model.graph, node, transposed)
        elif node.op_type == "Transpose":
            _to_one_transpose(model.graph, node)
        elif node.op_type == "Div":
            _to_reciprocal(model.graph, node)
    common.RemoveUnusedNodesPass()(model)
    _unshare(model.graph)
    for node in model.graph.all_nodes():
        if operators.is_ours(node, opset):
            node.domain = operators.DOMAIN
    model.opset_imports[operators.DOMAIN] = 1


def _replace(graph: ir.Graph, old: list[ir.Node], new: ir.Node) -> None:
    """Replace several nodes, the last of which computes the result, by one."""
    first, result = old[0], old[-1].outputs[0]
    new.name = first.name
    new.metadata_props.update(first.metadata_props)
    new.meta[PLACE], new.meta[KIND] = first.meta.get(PLACE, 0), first.meta.get(KIND, first.op_type)
    new.outputs[0].name, new.outputs[0].shape, new.outputs[0].type = result.name, result.shape, result.type
    ir.convenience.replace_nodes_and_values(graph, old[-1], old, [new], [result], new.outputs)


def _only_user(value: ir.Value) -> ir.Node | None:
    """The only node that reads the value, or None."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _to_one_transpose(graph: ir.Graph, node: ir.Node) -> None:
    """Transpose rank-4 keys in one node; PyTorch's exporter merges batch and heads, transposes, and splits them again."""
    before, after = node.inputs[0].producer() if node.inputs[0] is not None else None, _only_user(node.outputs[0])
    if before is None or after is None or before.op_type != "Reshape" or after.op_type != "Reshape":
        return
    x, y = before.inputs[0], after.outputs[0]
    if x is None or x.shape is None or y.shape is None:
        return
    if _only_user(before.outputs[0]) is not node or _permutation(node) != [0, 2, 1]:
        return
    old, new = list(x.shape), list(y.shape)
    known = not any(isinstance(size, ir.SymbolicDim) and size.value is None for size in old)
    if len(old) == 4 and known and new == [old[0], old[1], old[3], old[2]]:
        turned = ir.Node("", "Transpose", [x], [ir.AttrInt64s("perm", [0, 1, 3, 2])])
        _replace(graph, [before, node, after], turned)


def _permutation(node: ir.Node) -> list[int] | None:
    return list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else None


def _to_reciprocal(graph: ir.Graph, node: ir.Node) -> None:
    """Replace 1 / x by Reciprocal."""
    one, x = node.inputs
    data = one.const_value if one is not None and one.is_initializer() else None
    if x is not None and data is not None and data.dtype.is_floating_point() and data.shape.rank() == 0 and data.numpy() == 1:
        _replace(graph, [node], ir.Node("", "Reciprocal", [x]))


def _unshare(graph: ir.Graph) -> None:
    """Give every module its own weight vectors: exporters store equal ones, such as all zero biases, only once."""
    for value in list(graph.initializers.values()):
        uses = list(value.uses())
        if _weight_data(value, 1) is None or len(uses) < 2:
            continue
        owned: dict[str, ir.Value] = {}
        for use in uses:
            leaf = _LEARNED.get((use.node.op_type, use.idx))
            name = f"{module_path(use.node)}.{leaf}"
            if leaf is None or name == value.name:
                continue
            if name not in owned:
                owned[name] = ir.Value(
                    name=f"{value.name}_{use.node.name}", shape=value.shape, type=value.type, const_value=value.const_value
                )
                owned[name].meta[NAME] = name
                graph.initializers.add(owned[name])
            use.node.replace_input_with(use.idx, owned[name])
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[str(value.name)]


def _to_linear(graph: ir.Graph, node: ir.Node, transposed: dict[ir.Value, ir.Value]) -> None:
    """Replace a matrix product of `x` with a weight, and the bias addition after it, by one `Linear`."""
    x, matrix, *rest = node.inputs
    weight = _weight(graph, node, matrix, transposed)
    if x is None or weight is None or x.is_initializer():
        return
    old, bias = [node], next(iter(rest), None)
    features = None if weight.shape is None else weight.shape[0]
    if node.op_type == "Gemm" and bias is not None and not _is_bias(bias, features):
        return
    after = _only_user(node.outputs[0])
    if node.op_type == "MatMul" and after is not None and after.op_type == "Add" and after.graph is graph:
        bias = next((operand for operand in after.inputs if operand is not None and _is_bias(operand, features)), None)
        old += [after] if bias is not None else []
    new = ir.Node(operators.DOMAIN, "Linear", [x, weight] if bias is None else [x, weight, bias])
    # A name from an exporter, such as `onnx::MatMul_12` or `val_8`, and not from the model.
    if not str(weight.meta.get(NAME, weight.name)).endswith(".weight"):
        weight.meta[NAME] = _name_of_weight(bias, node)
    _replace(graph, old, new)


def _weight(graph: ir.Graph, node: ir.Node, matrix: ir.Value | None, transposed: dict[ir.Value, ir.Value]) -> ir.Value | None:
    """The weight of a matrix product, [out, in]; None if the factor is not a weight."""
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = options.get("alpha", 1.0) == 1.0 and options.get("beta", 1.0) == 1.0 and not options.get("transA", 0)
    if matrix is None or not plain:
        return None
    if options.get("transB", 0):
        return matrix if _is_matrix(matrix) else None
    producer = matrix.producer()
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        return producer.inputs[0] if _permutation(producer) in ([1, 0], None) and _is_matrix(producer.inputs[0]) else None
    if (data := _weight_data(matrix, 2)) is None:
        return None
    if matrix not in transposed:
        rows, columns = data.shape.numpy()
        name, turned = f"{matrix.name}_transposed", ir.Shape([columns, rows])
        new = ir.Value(name=name, shape=turned, type=matrix.type, const_value=matrix.const_value)
        new.meta[TRANSPOSED] = True
        new.meta[NAME] = matrix.name
        graph.initializers.add(new)
        transposed[matrix] = new
    return transposed[matrix]


def _is_matrix(value: ir.Value) -> bool:
    return _weight_data(value, 2) is not None


def _is_bias(value: ir.Value, features: object) -> bool:
    data = _weight_data(value, 1)
    return data is not None and data.shape[0] == features


def _weight_data(value: ir.Value, rank: int) -> ir.TensorProtocol | None:
    """The elements of a floating-point weight of that rank; None for any other value."""
    data = value.const_value
    if not value.is_initializer() or data is None or len(data.shape) != rank:
        return None
    return data if data.dtype.is_floating_point() else None


def _name_of_weight(bias: ir.Value | None, node: ir.Node) -> str:
    """A name for a weight without one: from its module, or without a known module from its bias's name."""
    owner = "" if is_in_module(node) or bias is None else str(bias.name)
    return f"{owner.removesuffix('.bias') if owner.endswith('.bias') else module_path(node)}.weight"
