"""The IR of a program: its ONNX model in standard operators, with Q/DQ, read by OpenVINO's frontend and written as XML and weights."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import openvino

from lissom.backends.onnx.export import export_onnx, save_onnx
from lissom.backends.onnx.quantized_layers import Layer, quantized_layers
from lissom.backends.onnx.translation import check_translatable
from lissom.backends.onnx.variants import RMS_NORMS, write_variant
from lissom.backends.openvino.network import reason_of
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.errors import UnsupportedError


def write_ir(program: Program, example: Sample, path: Path, *, decompose: bool) -> Mapping[str, Layer]:
    """Write a lowered program as IR: `path`, an .xml, and its weights beside it, a .bin; returns its quantized layers by name.

    The .bin holds weights in their own precision: integers of four and eight bits as such, float32 as float32.

    Args:
        decompose: as for `export_onnx`.

    Raises:
        UnsupportedError: when PyTorch's exporter or OpenVINO's frontend cannot translate the program.
    """
    check_translatable(program, "OpenVINO")
    # The exporter runs translations and decompositions of any operator, and OpenVINO's errors have no common class.
    with refused(program), TemporaryDirectory(prefix="lissom-") as folder:
        exported = export_onnx(program, example, decompose)
        layers = quantized_layers(exported)
        model = write_variant(exported, [RMS_NORMS], standard=True)[0]
        names = {value.name: node.name for node in model.graph for value in node.outputs}
        # Rewrites keep the names of products' outputs, and name the nodes after their modules.
        named = {
            names.get(layer.product.outputs[0].name) or f"unnamed {index}": layer for index, layer in enumerate(layers)
        }
        onnx_file = save_onnx(model, Path(folder))
        del exported, model
        openvino.save_model(openvino.Core().read_model(onnx_file), path, compress_to_fp16=False)
    return named


@contextmanager
def refused(program: Program) -> Generator[None]:
    """Raise UnsupportedError for any error of the block, with the reason in one line."""
    try:
        yield
    except UnsupportedError:
        raise
    except Exception as error:
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        raise UnsupportedError(f"OpenVINO cannot run {program.name}: {reason_of(error)}; choose backend 'eager'") from error
