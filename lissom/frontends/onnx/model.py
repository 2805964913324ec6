"""ONNX files as modules, through onnx2fx.

The graph is read (`graph`) and simplified exactly (`rewrites`). onnx2fx converts its operators to PyTorch, except those in
`operators`. This module adds the weights under their names in the file, and the origin of every node. Weights do not pass
through the conversion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from lissom.errors import CaptureError, LissomError, UnsupportedError
from lissom.frontends.onnx.dimension_text import NoFormulaError, names_in, size_of
from lissom.frontends.onnx.sizes import MOST, remember, with_numbers

if TYPE_CHECKING:
    import onnx_ir as ir

_BATCH, _FIRST_LENGTH = 2, 8
_MOST_ELEMENTS = 2**28


@dataclass(frozen=True)
class Input:
    """An input of an ONNX graph.

    Attributes:
        sizes: for each dimension a number, or the name or formula of a dynamic size.
        rows: if the input indexes a table, the table's number of rows.
    """

    name: str
    dtype: torch.dtype
    sizes: tuple[int | str, ...]
    rows: int | None = None


@dataclass(frozen=True)
class OnnxModel:
    """A module made from an ONNX file, and the inputs it takes, in order."""

    module: fx.GraphModule
    inputs: tuple[Input, ...]

    @property
    def names(self) -> list[str]:
        """The names of the module's arguments: the inputs' names as Python identifiers."""
        return [str(node.target) for node in self.module.graph.nodes if node.op == "placeholder"]

    def example_inputs(self) -> dict[str, torch.Tensor]:
        """Inputs with the sizes in the file; dynamic sizes are small: two rows, eight or more of the rest."""
        sizes: dict[str, int] = {}
        return {name: _example(declared, sizes) for name, declared in zip(self.names, self.inputs, strict=True)}

    def describe_inputs(self) -> str:
        """The inputs as the file declares them, `input_ids[batch, sequence]`."""
        return ", ".join(f"{declared.name}[{', '.join(map(str, declared.sizes))}]" for declared in self.inputs)


def from_onnx(path: str | Path) -> nn.Module:
    """An ONNX file as a module that takes the file's inputs, by name or in order, and returns its outputs.

    A single output is returned alone, several as a tuple. Floating-point weights are parameters with their names in the file.

    Raises:
        ArtifactError: if the file is missing, is not ONNX, or lacks its external data.
        UnsupportedError: for an operator that cannot be converted, with the name of its node, and if the packages of the extra
            `from-onnx` are not installed.

    Examples:
        >>> import tempfile, onnx, torch, lissom
        >>> path = tempfile.mkdtemp() + "/model.onnx"
        >>> onnx.save(onnx.parser.parse_model('''
        ...     <ir_version: 10, opset_import: ["" : 20]>
        ...     agraph (float[N, 4] x) => (float[N, 4] y) { y = Gelu(x) }'''), path)
        >>> lissom.from_onnx(path)(torch.zeros(2, 4)).shape
        torch.Size([2, 4])
    """
    return read(path).module


def read(path: str | Path) -> OnnxModel:
    """The module of an ONNX file, with its inputs. Raises as `from_onnx`."""
    for name in ("onnx2fx", "onnx_ir"):
        try:
            import_module(name)
        except ImportError as error:
            raise UnsupportedError("reading an ONNX file needs onnx2fx and onnx-ir: pip install 'lissom[from-onnx]'") from error
    path = Path(path)
    try:
        return _read(path)
    except LissomError:
        raise
    # The errors of onnx, onnx-ir and onnx2fx for a graph they cannot read have no common class.
    except Exception as error:
        from lissom.frontends.onnx.file import root_line

        raise UnsupportedError(f"{path} cannot be converted: {root_line(error)}") from error


def _read(path: Path) -> OnnxModel:
    import onnx2fx
    import onnx_ir as ir

    from lissom.frontends.onnx import graph as onnx_graph
    from lissom.frontends.onnx import operators, rewrites

    model = onnx_graph.load(path)
    rewrites.simplify(model)
    operators.register()
    onnx_graph.check_operators(model, path)
    rows = onnx_graph.rows_of(model)
    inputs = tuple(_input(value, rows, path) for value in model.graph.inputs)
    origins = onnx_graph.origins_of(model, path)
    weights = onnx_graph.take_weights(model)
    converted = onnx2fx.convert(ir.to_proto(model))
    onnx_model = OnnxModel(_module(converted, re.sub(r"\W", "_", path.stem), weights, origins), inputs)
    onnx_model.module.meta["dynamic"] = {
        name: {index: size for index, size in enumerate(declared.sizes) if isinstance(size, str)}
        for name, declared in zip(onnx_model.names, inputs, strict=True)
    }
    return onnx_model


def _input(value: ir.Value, rows: Mapping[str, int], path: Path) -> Input:
    from lissom.frontends.onnx.graph import torch_dtype

    dtype = None if value.dtype is None else torch_dtype(value.dtype)
    if dtype is None or value.shape is None:
        raise UnsupportedError(
            f"input {value.name!r} of {path} is {value.type} of shape {value.shape}; only tensors of a known rank are taken"
        )
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    # Some exporters write -1 for a size that varies.
    named = tuple(
        f"size_{index}" if size is None or (isinstance(size, int) and size < 0) else size for index, size in enumerate(sizes)
    )
    return Input(str(value.name), dtype, named, rows.get(str(value.name)))


def _module(
    converted: fx.GraphModule,
    name: str,
    weights: Mapping[str, tuple[str, torch.Tensor]],
    origins: Mapping[str, tuple[str, str]],
) -> fx.GraphModule:
    """The converted graph with the file's weights, an origin on every node, and known sizes propagated between nodes."""
    graph, root = converted.graph, nn.Module()
    for child, module in converted.named_children():
        root.add_module(child, module)
    for node in list(graph.nodes):
        if str(node.target) in weights and node.op in ("placeholder", "get_attr"):
            _read_weight(graph, root, node, *weights[str(node.target)])
    origin = ("", "")
    for node in reversed(graph.nodes):
        if node.op != "call_function":
            continue
        # A conversion may make several nodes, of which only the last has the ONNX node's name.
        origin = origins.get(node.meta.get("onnx_name", ""), origin)
        kind = node.meta.get("onnx_op_type", "operator")
        node.meta = {"nn_module_stack": {origin[0]: (origin[0], f"onnx.{kind}")}, "stack_trace": origin[1]}
        node.target = with_numbers(node.target, kind)
    return fx.GraphModule(root, graph, name if name.isidentifier() else f"model_{name}")


def _read_weight(graph: fx.Graph, root: nn.Module, node: fx.Node, name: str, tensor: torch.Tensor) -> None:
    """Replace a node by a read of the weight `name`; a small weight remembers its elements."""
    folder, _, leaf = name.rpartition(".")
    owner = root
    for part in folder.split(".") if folder else ():
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if not hasattr(owner, leaf):
        learned = tensor.is_floating_point() and tensor.numel() > 1
        owner.register_parameter(leaf, nn.Parameter(tensor)) if learned else owner.register_buffer(leaf, tensor)
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        read = graph.create_node("get_attr", name)
    value = read
    if tensor.numel() <= MOST:
        with graph.inserting_after(read):
            value = graph.call_function(remember, (read, tuple(tensor.reshape(-1).tolist())))
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _example(declared: Input, sizes: dict[str, int]) -> torch.Tensor:
    """An example of one input; `sizes` holds the sizes chosen so far, by name."""
    shape = [_size(size, sizes) for size in declared.sizes]
    if math.prod(shape) > _MOST_ELEMENTS:
        raise CaptureError(
            f"input {declared.name!r} is {shape}, and example inputs are made of at most {_MOST_ELEMENTS} elements; "
            f"give example inputs of your own"
        )
    generator = torch.Generator().manual_seed(0)
    if declared.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(declared.dtype)
    if declared.dtype is torch.bool or "mask" in declared.name:
        return torch.ones(shape, dtype=declared.dtype)
    if "position" in declared.name and shape:
        return torch.arange(shape[-1], dtype=declared.dtype).expand(shape).contiguous()
    if "type" in declared.name or "segment" in declared.name:
        return torch.zeros(shape, dtype=declared.dtype)
    return torch.randint(0, declared.rows or 2, shape, generator=generator).to(declared.dtype)


def _size(size: int | str, sizes: dict[str, int]) -> int:
    """A number for a size: a new name gets a distinct number, and a formula is computed."""
    if isinstance(size, int):
        return size
    try:
        for name in names_in(size):
            sizes.setdefault(name, _BATCH if not sizes else _FIRST_LENGTH + 3 * (len(sizes) - 1))
        return size_of(size, sizes)
    except NoFormulaError:
        return sizes.setdefault(size, _FIRST_LENGTH + 3 * len(sizes))
