"""The IR of a program: its ONNX model in standard operators, with Q/DQ, read by OpenVINO and written to two files."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir
import openvino

from lissom.backends.exported import root_of
from lissom.backends.names import input_names, state_names
from lissom.backends.onnx.export import export_onnx, save_onnx
from lissom.backends.onnx.quantized_layers import Layer, quantized_layers
from lissom.backends.onnx.translation import check_translatable
from lissom.backends.onnx.variants import RMS_NORMS, write_variant
from lissom.backends.openvino.indices import limit_indices
from lissom.backends.openvino.integers import (
    Quantized,
    QuantizedLayer,
    group_size,
    leave_rounding,
    rounded_by_kernels,
    write_check,
)
from lissom.backends.openvino.network import GROUP_SIZE, core, options_of, reason_of, shared
from lissom.backends.openvino.softplus import write_out_softplus
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.errors import LissomError, UnsupportedError

_UNCONVERTED = re.compile(r"No conversion rule found for operations: (.+)")


def write_ir(program: Program, example: Sample, path: Path, *, decompose: bool, threads: int) -> Quantized:
    """Write a lowered program as IR: `path`, an .xml, and its weights beside it, a .bin; returns its quantized layers.

    The .bin holds weights in their own precision: integers of four and eight bits as such, float32 as float32.

    Args:
        decompose: as for `export_onnx`.
        threads: for the check of integer products on the example.

    Raises:
        UnsupportedError: when PyTorch's exporter or OpenVINO's frontend cannot translate the program.
        VerifyError: when OpenVINO's integer products are wrong on this processor.
    """
    check_translatable(program, "OpenVINO")
    # The exporter runs translations and decompositions of any operator, and OpenVINO's errors have no common class.
    with refused(program):
        exported = export_onnx(program, example, decompose)
        limit_indices(exported)
        write_out_softplus(exported)
        layers = quantized_layers(exported)
        group = group_size(layers)
        by_kernel = _checked(program, example, exported, group, threads) if layers else set[int]()
        leave_rounding(exported, by_kernel)
        model = write_variant(exported, [RMS_NORMS], standard=True)[0]
        found = [quantized_layer(model, layer, index in by_kernel) for index, layer in enumerate(layers)]
        for old in (path, path.with_suffix(".bin")):
            # A network may still map it.
            old.unlink(missing_ok=True)
        converted = read_onnx(program, model)
        converted.set_rt_info(str(group), list(GROUP_SIZE))
        openvino.save_model(converted, path, compress_to_fp16=False)
    return Quantized(found, group)


def quantized_layer(model: ir.Model, layer: Layer, rounds: bool) -> QuantizedLayer:
    """A layer with the names that it may have in OpenVINO's executed graph, the surest first.

    Rewrites keep the names of products' outputs, and name the nodes after their modules. OpenVINO names a product that it fused
    with its bias after the sum.
    """
    named = {value.name: node for node in model.graph for value in node.outputs}
    product = named.get(layer.product.outputs[0].name)
    sums = [node for node in product.outputs[0].consumers() if node.op_type == "Add"] if product is not None else []
    nodes = [node.name for node in (product, *sums) if node is not None and node.name]
    weight = layer.weight.name
    return QuantizedLayer(layer, (*nodes, f"{weight}", f"{weight}_elements"), rounds)


def read_onnx(program: Program, model: ir.Model) -> openvino.Model:
    """The model as OpenVINO converts it. Raises UnsupportedError, with a node, for operators that it has no conversion for."""
    with TemporaryDirectory(prefix="lissom-") as folder:
        # Weights are mapped, and stay readable after the file is deleted.
        path = save_onnx(model, Path(folder))
        try:
            return core().read_model(path)
        except RuntimeError as error:
            lacking = _UNCONVERTED.search(str(error))
            if lacking is None:
                raise
            kinds = {name.partition("-")[0].strip() for name in lacking[1].split(",")}
            node = next((node.name for node in model.graph.all_nodes() if node.op_type in kinds), None)
            raise UnsupportedError(
                f"OpenVINO cannot run {program.name}: it has no conversion for {lacking[1].strip()} of ONNX"
                f"{f', first in {node!r}' if node else ''}; choose backend 'eager'"
            ) from error


def _checked(program: Program, example: Sample, exported: ir.Model, group: int, threads: int) -> set[int]:
    """The indices of the layers whose kernels quantize activations per group, after checking every integer product.

    Raises:
        VerifyError: when a product with static scales is wrong.
    """
    model, names = write_check(exported, group)
    if not names:
        return set()
    compiled = core().compile_model(
        read_onnx(program, write_variant(model, [RMS_NORMS], standard=True)[0]), "CPU", options_of(program, threads, group)
    )
    inputs = [*input_names(program), *state_names(program)[0]]
    tensors = [*example, *(program.weight(name) for name in program.state)]
    given = {name: shared(tensor.detach().contiguous()) for name, tensor in zip(inputs, tensors, strict=True)}
    results = compiled.create_infer_request().infer(given)
    return rounded_by_kernels({name: float(results[name]) for name in names}, names)


@contextmanager
def refused(program: Program) -> Generator[None]:
    """Raise UnsupportedError for any error of the block but ours, with the reason in one line."""
    try:
        yield
    except LissomError:
        raise
    except Exception as error:
        reason = reason_of(root_of(error))
        raise UnsupportedError(f"OpenVINO cannot run {program.name}: {reason}; choose backend 'eager'") from error
