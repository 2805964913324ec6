"""A program as an ONNX model: torch's exporter, keeping the program's names, module paths and free sizes."""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import sympy
import torch
from onnxscript.optimizer import optimize
from torch import fx
from torch.export import ExportedProgram

from lissom.backends.exported import free_dimensions, traced_example
from lissom.backends.names import input_names, output_names, results_of, state_names
from lissom.backends.onnx.experts import split_experts
from lissom.backends.onnx.recurrences import RECURRENCES
from lissom.backends.onnx.state import return_state
from lissom.backends.onnx.translation import OPSET, TRANSLATIONS
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.fake import recurrent_layers_whole
from lissom.compiler.ir.operators import PLAIN_RNNS, RECURRENT_LAYERS, packet_of
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.frontends.capture.isolation import only_errors, translations_kept

MODEL, WEIGHTS = "model.onnx", "model.onnx.data"
"""The files of a saved model; weights are external, so that they can be memory-mapped and exceed 2 GB."""

aten = torch.ops.aten

_WHOLE = [target for target in RECURRENT_LAYERS if target not in PLAIN_RNNS]
"""The recurrent layers that have translations; others are computed step by step."""
_SPELLINGS: Mapping[object, torch._ops.OpOverload] = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.min.other: aten.minimum.default,
    aten.max.other: aten.maximum.default,
}
_PATHS = "pkg.torch.onnx.name_scopes"
_NO_MODULE = "_empty_nn_module_stack"
_WINDOW = 16
"""The number of nodes ahead in which the counterpart of an exported node is searched."""


def export_onnx(program: Program, example: Sample, decompose: bool = True) -> ir.Model:
    """The program as an ONNX model, with the names of the caller's inputs and outputs.

    State is a further input, and the state after the call a further output. Some operators are nodes of the domain `lissom`;
    `variants.write_variant` replaces them with operators of ONNX Runtime.

    Args:
        decompose: decompose operators first. The exporter then has translations for nearly all, and takes twice as long.
    """
    with recurrent_layers_whole(_WHOLE):
        exported = _export(program, example)
    if not decompose:
        exported.run_decompositions = lambda *_, **__: exported  # pyright: ignore[reportUnknownLambdaType]
    _keep_origins(program, exported)
    past, present = state_names(program)
    inputs, outputs = input_names(program) + past, output_names(program) + present
    # Warnings about the exporter's internals, and messages about our untyped translations; failures raise.
    with (
        warnings.catch_warnings(),
        only_errors("torch.onnx"),
        torch.no_grad(),
        recurrent_layers_whole(_WHOLE),
        translations_kept(),
    ):
        warnings.simplefilter("ignore")
        result = torch.onnx.export(
            exported,
            (),
            input_names=inputs,
            output_names=outputs,
            opset_version=OPSET,
            custom_translation_table={**TRANSLATIONS, **RECURRENCES},
            dynamo=True,
            verbose=False,
            optimize=False,
        )
        assert result is not None
        model = result.model
        _name_transposed(model)
        # Not by the exporter, which fuses to operators whose kernels accept less than the standard says. Any error may come:
        # the optimizer evaluates constant nodes with the reference implementation of their operator. It then stops, and the
        # nodes it has not folded stay as they are.
        with suppress(Exception):
            optimize(model)
    split_experts(model)
    _name_sizes(program, model)
    return model


def save_onnx(model: ir.Model, folder: Path) -> Path:
    """Write the model and its weights to a folder; returns the model's path."""
    path = folder / MODEL
    ir.save(model, path, external_data=WEIGHTS)
    return path


def tidy(model: ir.Model) -> None:
    """Merge common subexpressions, drop unused nodes, and name nodes after their modules."""
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common_passes.LiftSubgraphInitializersToMainGraphPass()(model)
    common_passes.DeduplicateInitializersPass()(model)
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.RemoveUnusedOpsetsPass()(model)
    _name_nodes(model)


def _export(program: Program, example: Sample) -> ExportedProgram:
    traced = (*traced_example(program, example), *(program.weight(name).detach() for name in program.state))
    flat = program.copy()
    flat.output.args = (tuple(results_of(flat)),)
    return_state(flat)
    _copy_returned_inputs(flat)
    _respell(flat)
    shapes = (*(free_dimensions(leaf) for leaf in program.signature.tensors), *({} for _ in program.state))
    # The exporter reads the arguments from generated code, which the copy lacks.
    module = fx.GraphModule(flat.graph_module, flat.graph).eval()
    with torch.no_grad():
        return torch.export.export(module, traced, dynamic_shapes=shapes, strict=False)


def _copy_returned_inputs(program: Program) -> None:
    """Return copies of inputs that are outputs as they are: the exporter would give the input the output's name."""
    for result in program.output.all_input_nodes:
        if result.op == "placeholder":
            with program.graph.inserting_before(program.output):
                copied = program.graph.call_function(aten.clone.default, (result,))
            copied.meta = dict(result.meta)
            program.output.replace_input_with(result, copied)


def _respell(program: Program) -> None:
    """Replace operators by equivalents that the exporter translates."""
    for node in program.nodes():
        node.target = _SPELLINGS.get(node.target, node.target)
        if packet_of(node) is aten.to:
            node.target, node.args = aten._to_copy.default, node.args[:1]
            node.kwargs = {"dtype": nodes.tensor_type(node).dtype}
        elif node.target is aten.rsub.Scalar and len(node.args) == 2 and not node.kwargs:
            # For an integer tensor and a float the exporter writes a `Sub` of mixed types, which is invalid.
            with program.graph.inserting_before(node):
                negative = program.graph.call_function(aten.neg.default, node.args[:1])
            node.target, node.args = aten.add.Tensor, (negative, node.args[1])


def _keep_origins(program: Program, exported: ExportedProgram) -> None:
    """Set the module path of each exported node; the nodes of both graphs are in the same order."""
    ours, start = program.nodes(), 0
    path = ""
    for node in exported.graph.nodes:
        if node.op != "call_function":
            continue
        # A node that export added, such as the read of a size, has no counterpart, and takes the module of the node before it.
        counterpart = next(
            (index for index in range(start, min(start + _WINDOW, len(ours))) if ours[index].target == node.target), None
        )
        if counterpart is not None:
            path, start = nodes.origin(ours[counterpart]).module_path, counterpart + 1
        stack = {"": ("", program.name)} | ({path: (path, "module")} if path else {})
        node.meta["nn_module_stack"] = stack


def _name_transposed(model: ir.Model) -> None:
    """Name transposed weights, which constant folding makes, after the weight."""
    counts: Counter[str] = Counter()
    for node in model.graph:
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is not None and weight.is_initializer():
            name = f"{weight.name}_transposed"
            counts[name] += 1
            node.outputs[0].name = name if counts[name] == 1 else f"{name}_{counts[name] - 1}"


def _name_sizes(program: Program, model: ir.Model) -> None:
    """Name free sizes as in the program's signature."""
    names: dict[str, str] = {}
    # State follows the inputs, and has fixed sizes.
    for leaf, value in zip(program.signature.tensors, model.graph.inputs, strict=False):
        for size, exported_size in zip(leaf.type.shape, value.shape or (), strict=True):
            dimension = program.signature.dimensions.get(size) if isinstance(size, sympy.Symbol) else None
            if isinstance(exported_size, ir.SymbolicDim) and exported_size.value and dimension is not None:
                names[exported_size.value] = dimension.name
    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape([_named(size, names) for size in value.shape])


def _named(size: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return re.sub(r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), str(size.value))


def module_of(node: ir.Node) -> str:
    """The module path of a node."""
    scopes = ast.literal_eval(node.metadata_props.get(_PATHS, "[]"))
    path = node.metadata_props.get("module", scopes[-2] if len(scopes) > 1 else "")
    return "" if path.startswith(_NO_MODULE) else path


def _name_nodes(model: ir.Model) -> None:
    counts: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        path = module_of(node)
        name = f"{path}/{node.op_type}".lstrip("/")
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name] - 1}"
        node.metadata_props.clear()
        node.metadata_props["module"] = path
        if node.graph is not model.graph:
            # Names inside a subgraph must differ from those outside.
            for number, value in enumerate(node.outputs):
                value.name = f"{node.name}.{number}"
    model.graph.metadata_props.clear()
