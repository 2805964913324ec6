"""Conversion of an exported program: weights as attributes, typed nodes with origins, named dimensions."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument as ExportedConstant
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.fake import FlatModule, fake_mode
from lissom.compiler.ir.node import Origin
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.signature import Argument, ConstantArgument, Dimension, Leaf, Signature, TensorArgument
from lissom.compiler.ir.types import type_of
from lissom.compiler.ir.view_calls import Item
from lissom.errors import CaptureError
from lissom.frontends.capture.cache_lengths import CacheLengths, Place, tie_lengths
from lissom.frontends.capture.untouched import alias
from lissom.ops import grouped_product

_WEIGHTS = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
FRAME = re.compile(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)')
_NO_MODULE = "_empty_nn_module_stack"
_TORCH = str(Path(torch.__file__).parent)
_OF_OTHERS: Mapping[str, torch._ops.OpOverload] = {
    "transformers.grouped_mm_fallback.default": grouped_product,
    "aten._grouped_mm.default": grouped_product,
}
"""Operators registered by other packages, by name, and the equivalent Lissom operators."""


def flatten_exported(
    exported: ExportedProgram,
    name: str,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    parameters: tuple[str, ...],
    *,
    has_caches: bool = False,
    lengths: CacheLengths | None = None,
    names: Mapping[Place, str] = MappingProxyType({}),
) -> Program:
    """The exported program as a flat program.

    Args:
        args: the caller's positional example inputs, for their nesting and constants.
        kwargs: the keyword ones.
        parameters: the parameter names of the model's `forward`.
        has_caches: whether inputs of rank 4 are caches, whose lengths may be equal to the sequence in the example alone.
        lengths: of the caches among the arguments.
        names: the caller's names of dimensions, by input and dimension.

    Raises:
        CaptureError: for mutated inputs, control flow and custom objects, which a program cannot hold.
    """
    _unify_sizes(exported, 3 if has_caches else None, names)
    tie_lengths(_inputs(exported), lengths)
    weights = _weights(exported)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    reads: dict[int, fx.Node] = {}

    def translate(node: fx.Node) -> fx.Node:
        """The copy of a node; a `get_attr` node is made at a weight's first use, and one for tied weights."""
        if node in copied:
            return copied[node]
        target = weights[node.name]
        tensor = tensors[target]
        if id(tensor) not in reads:
            read = graph.get_attr(target)
            read._rename(node.name)
            nodes.set_value(read, node.meta["val"])
            reads[id(tensor)] = read
        copied[node] = reads[id(tensor)]
        return copied[node]

    tensors = {target: _tensor(exported, target) for target in weights.values()}
    for spec, node in zip(exported.graph_signature.input_specs, _placeholders(exported), strict=True):
        if spec.kind == InputKind.USER_INPUT and isinstance(node.meta["val"], torch.Tensor):
            copied[node] = graph.placeholder(node.name)
            nodes.set_value(copied[node], node.meta["val"])
    _copy_calls(graph, exported.graph_module, copied, translate)
    state = _written(exported, {str(read.target) for read in reads.values()})
    _write_outputs(exported, graph, translate, state)
    signature = _signature(exported, args, kwargs, parameters)
    used = {str(node.target): tensors[str(node.target)] for node in graph.nodes if node.op == "get_attr"}
    used = {target: used[target].clone() if target in state else alias(used[target]) for target in used}
    return Program(name, FlatModule(used, graph), signature, state)


def _placeholders(exported: ExportedProgram) -> list[fx.Node]:
    return [node for node in exported.graph.nodes if node.op == "placeholder"]


def _weights(exported: ExportedProgram) -> dict[str, str]:
    """For each lifted weight's placeholder, the weight's name in the model.

    Raises:
        CaptureError: for inputs that are neither tensors nor constants.
    """
    names = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind in _WEIGHTS:
            names[spec.arg.name] = str(spec.target)
        elif spec.kind != InputKind.USER_INPUT:
            raise CaptureError(f"the model uses a {spec.kind.name.lower()} ('{spec.target}'), which a program cannot hold")
    return names


def _tensor(exported: ExportedProgram, target: str) -> torch.Tensor:
    tensor = exported.state_dict.get(target)
    if tensor is None:
        tensor = exported.constants[target]
        assert isinstance(tensor, torch.Tensor)
    return tensor


def _copy_calls(graph: fx.Graph, module: fx.GraphModule, copied: dict[fx.Node, fx.Node], translate) -> None:  # noqa: ANN001
    """Copy the calls of a module; blocks without effect at inference are inlined."""
    results: dict[fx.Node, Sequence[object]] = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or _is_evaluated(node):
            continue
        block = _block(node)
        if (element := Item.of(node)) is not None and element.source in results:
            copied[node] = translate(results[element.source][element.index])
        elif block is None:
            copied[node] = _copy_call(graph, node, translate)
        else:
            inner = getattr(module, str(nodes.operand(node, block).target))
            assert isinstance(inner, fx.GraphModule)
            inputs = inner.graph.find_nodes(op="placeholder")
            copied |= {leaf: translate(given) for leaf, given in zip(inputs, node.args[block + 1 :], strict=True)}
            _copy_calls(graph, inner, copied, translate)
            results[node] = nodes.leaves(inner.graph.output_node())


def _is_evaluated(node: fx.Node) -> bool:
    """True if capture evaluated the call and its readers hold the result itself: a dtype or flag, as of `promote_types`."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.returns) and node.meta.get("val") is None and not node.users


def _block(node: fx.Node) -> int | None:
    """The argument index of the graph in a `torch.no_grad()` or `torch.autocast(enabled=False)` call; None for other calls."""
    name = str(node.target)
    if name == "wrap_with_set_grad_enabled":
        return 1
    return 4 if name == "wrap_with_autocast" and node.args[2] is False else None


def _copy_call(graph: fx.Graph, node: fx.Node, translate) -> fx.Node:  # noqa: ANN001
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise CaptureError(
            f"the model holds control flow ({node.target}) at {_origin(node).source or 'an unknown line'}; "
            f"a program is one straight graph: take the branch out of the model"
        )
    copied = graph.node_copy(node, translate)
    # PyTorch's grouped product with a bias or another output type is none of ours.
    if len(node.args) == 3 and not node.kwargs:
        copied.target = _OF_OTHERS.get(str(node.target), node.target)
    copied.meta = {}
    # A view needs the strides seen at capture; with gradients, or on another device, operators return other strides.
    if copied.target is torch.ops.aten.view.default:
        copied.target = torch.ops.aten.reshape.default
    nodes.set_value(copied, node.meta.get("val"))
    nodes.set_origin(copied, _origin(node))
    return copied


def _origin(node: fx.Node) -> Origin:
    """Module path and source line of an exported node."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(stack[-1][0]) if stack else ""
    path = "" if path.startswith(_NO_MODULE) else path
    trace = FRAME.findall(node.meta.get("stack_trace") or "")
    frames = [frame for frame in trace if not frame[0].startswith((_TORCH, "<"))]
    if not frames:
        return Origin(path)
    file, line, code = frames[-1]
    return Origin(path, f"{Path(file).name}:{line}", code.strip())


def _written(exported: ExportedProgram, read: set[str]) -> tuple[str, ...]:
    """The buffers that carry state between calls: those that are written and read.

    A buffer that each call overwrites before use, such as the frequencies of longrope, is not state.
    """
    outputs = exported.graph_signature.output_specs
    names = (str(spec.target) for spec in outputs if spec.kind == OutputKind.BUFFER_MUTATION)
    return tuple(name for name in names if name in read)


def _write_outputs(exported: ExportedProgram, graph: fx.Graph, translate, state: Sequence[str]) -> None:  # noqa: ANN001
    """Write state updates as `copy_` nodes, then the outputs.

    Raises:
        CaptureError: if the model changes one of its inputs in place.
    """
    results = []
    placeholders = {node.name: node for node in _placeholders(exported)}
    buffers = {str(spec.target): placeholders[spec.arg.name] for spec in exported.graph_signature.input_specs if spec.target}
    leaves = nodes.leaves(exported.graph.output_node())
    for spec, leaf in zip(exported.graph_signature.output_specs, leaves, strict=True):
        if spec.kind == OutputKind.BUFFER_MUTATION:
            if spec.target not in state:
                continue
            write = graph.call_function(torch.ops.aten.copy_.default, (translate(buffers[str(spec.target)]), translate(leaf)))
            nodes.set_value(write, nodes.value(translate(leaf)))
        elif spec.kind == OutputKind.USER_INPUT_MUTATION:
            raise CaptureError(f"the model changes its argument '{spec.target}' in place; pass a copy inside the model")
        else:
            computed = isinstance(leaf, fx.Node) and (leaf.op != "placeholder" or isinstance(leaf.meta["val"], torch.Tensor))
            results.append(translate(leaf) if computed else _plain(leaf, spec))
    graph.output(tuple(results))


def _plain(leaf: object, spec) -> object:  # noqa: ANN001
    """A constant output."""
    if not isinstance(leaf, fx.Node):
        return leaf
    return spec.arg.value if isinstance(spec.arg, ExportedConstant) else leaf.meta["val"]


def _unify_sizes(exported: ExportedProgram, rank: int | None, names: Mapping[Place, str]) -> None:
    """Use one symbol for the batch, and one for the sequence, of inputs with equal example sizes, or with one name.

    Export keeps two symbols if nothing in the graph forces the sizes to be equal, as for a mask that is only indexed; equal
    example sizes mean one dimension. Masks over pairs of tokens have the sequence twice.

    Args:
        rank: of the inputs with a sequence, at most; None for any.
        names: the caller's, by input and dimension; sizes of unlike names stay apart.
    """
    first: dict[tuple[object, int], sympy.Symbol] = {}
    sizes = [
        (index, size, names.get((place, index)))
        for place, value in enumerate(_inputs(exported))
        if isinstance(value, torch.Tensor)
        for index, size in enumerate(value.shape if rank is None or value.dim() <= rank else value.shape[:1])
    ]
    for index, size, name in sorted(sizes, key=operator.itemgetter(0)):
        if not isinstance(size, torch.SymInt) or not isinstance(size.node.expr, sympy.Symbol):
            continue
        symbol, env = size.node.expr, size.node.shape_env
        # A later dimension shares a symbol only if its size is some input's sequence; height and width stay separate.
        if name is not None or index < 2:
            shared = first.setdefault((name or index, size.node.hint), symbol)
        else:
            shared = first.get((1, size.node.hint), symbol)
        if shared != symbol:
            env._set_replacement(symbol, shared, "inputs of equal example size")


def _inputs(exported: ExportedProgram) -> list[object]:
    """The fake values of the call's leaves, in order."""
    pairs = zip(exported.graph_signature.input_specs, _placeholders(exported), strict=True)
    return [node.meta["val"] for spec, node in pairs if spec.kind == InputKind.USER_INPUT]


def _signature(
    exported: ExportedProgram, args: Sequence[object], kwargs: Mapping[str, object], parameters: tuple[str, ...]
) -> Signature:
    specs = [spec for spec in exported.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    values = {node.name: node.meta["val"] for node in _placeholders(exported)}
    feed = iter(values[spec.arg.name] for spec in specs)
    named = list(named_arguments(args, kwargs, parameters).items())
    positional = tuple(_argument(name, value, feed) for name, value in named[: len(args)])
    keyword = tuple(_argument(name, value, feed) for name, value in kwargs.items())
    tensors = [leaf for argument in (*positional, *keyword) for leaf in argument.leaves if isinstance(leaf, TensorArgument)]
    dimensions = _dimensions(exported, tensors)
    conditions = _conditions(exported, set(dimensions))
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    return Signature(positional, keyword, parameters, out_spec, dimensions, conditions)


def named_arguments(args: Sequence[object], kwargs: Mapping[str, object], parameters: Sequence[str]) -> dict[str, object]:
    """The arguments of a call by the names of the signature: those that `*args` collects have none, and are numbered."""
    # The parameters after `*args` are keywords.
    names = [parameters[i] if i < len(parameters) and parameters[i] not in kwargs else f"args[{i}]" for i in range(len(args))]
    return dict(zip(names, args, strict=True)) | dict(kwargs)


def _argument(name: str, argument: object, feed) -> Argument:  # noqa: ANN001
    located, spec = pytree.tree_flatten_with_path(argument)
    leaves: list[Leaf] = []
    for path, leaf in located:
        value = next(feed)
        where = name + pytree.keystr(path)
        if isinstance(value, torch.Tensor):
            leaves.append(TensorArgument(where, nodes.tensor_type(type_of(value))))
        else:
            leaves.append(ConstantArgument(where, leaf))
    return Argument(name, spec, tuple(leaves))


def _dimensions(exported: ExportedProgram, tensors: Sequence[TensorArgument]) -> dict[sympy.Symbol, Dimension]:
    """A name and a range for each symbol in the inputs' sizes: dimension 0 is batch, dimension 1 sequence."""
    env = fake_mode(exported.graph).shape_env
    dimensions: dict[sympy.Symbol, Dimension] = {}
    names: set[str] = set()
    for leaf in tensors:
        for index, size in enumerate(leaf.type.shape):
            if not isinstance(size, sympy.Symbol) or size in dimensions:
                continue
            plain = re.sub(r"\W+", "_", leaf.path).strip("_")
            usual = ("batch", "sequence")[index] if index < 2 else f"{plain}_{index}"
            name = usual if usual not in names else f"{plain}_{usual if index < 2 else index}"
            names.add(name)
            bounds = env.var_to_range.get(size) if env else None
            lower = int(bounds.lower) if bounds is not None else 0
            upper = bounds.upper if bounds is not None else None
            maximum = int(upper) if isinstance(upper, sympy.Integer) else None
            # Tracing assumes sizes of 2 or more; size 1 is tried later, by `confirm`.
            dimensions[size] = Dimension(name, lower if lower > 2 else 1, maximum)
    return dimensions


def _conditions(exported: ExportedProgram, symbols: set[sympy.Symbol]) -> tuple[sympy.Basic, ...]:
    """The divisibility conditions of the model's sizes. Guards against sizes 0 and 1 come from tracing, and are left out."""
    env = fake_mode(exported.graph).shape_env
    guards = [env.simplify(guard.expr) for guard in env.guards] if env else []
    divisibility = [guard for guard in guards if isinstance(guard, sympy.Eq) and "Mod" in str(guard)]
    return tuple(dict.fromkeys(guard for guard in divisibility if guard.free_symbols and guard.free_symbols <= symbols))
