"""Capture of Dynamo graphs from `torch.compile`: classifies their arguments, and binds weights under their own names."""

from __future__ import annotations

import operator
import re
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import sympy
import torch
import torch._C._functorch as functorch
from torch import fx, nn
from torch._guards import CompileContext, tracing
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.ir.signature import Signature
from lissom.compiler.ir.types import size_of
from lissom.errors import CaptureError
from lissom.frontends.capture.dynamic import describe_dimensions
from lissom.frontends.capture.export import Capture, capture_sizes
from lissom.frontends.capture.untouched import alias, ordinary

_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)
_CONTAINERS = ("_parameters", "_buffers", "_modules")
_WHOLE_LAYERS = ("aten._transformer_encoder_layer_fwd.default", "aten._native_multi_head_attention.default")
"""The fused operators of torch.nn's fast path, in evaluation mode without gradients."""
_CASTING = ("cpu", "cuda")


Place = tuple[str, int]
"""The name of an input, and one of its dimensions."""


@dataclass(frozen=True)
class Graph:
    """A Dynamo graph with its arguments classified, by position.

    Attributes:
        module: the original graph.
        name: `Graph_` and Dynamo's number of it.
        inputs: the tensors passed by the caller, with names from the caller's code.
        weights: the parameters and buffers of modules, with their names there.
        numbers: integers and floats that are not sizes of inputs; they become constants of the program.
        sizes: the arguments that are sizes of inputs, each with one input dimension of this size.
        equal: groups of input dimensions that have equal sizes in every call of this graph.
    """

    module: fx.GraphModule
    name: str
    inputs: Mapping[int, str]
    weights: Mapping[int, str]
    numbers: Sequence[int]
    sizes: Mapping[int, Place]
    equal: Sequence[Sequence[Place]]

    @property
    def computes(self) -> bool:
        """False for a graph that computes no tensor; Dynamo makes some between two other graphs."""
        calls = (node for node in self.module.graph.nodes if node.op not in ("placeholder", "output", "get_attr"))
        return any(isinstance(node.meta.get("example_value"), (torch.Tensor, tuple, list)) for node in calls)

    def sample(self, args: Sequence[object]) -> Sample:
        """The input tensors among the arguments of a call."""
        return [tensor_of(args[index]) for index in self.inputs]

    def tensors(self, args: Sequence[object]) -> list[torch.Tensor]:
        """Every tensor the graph reads: inputs, weights, and its own constants."""
        held = (*self.module.parameters(), *self.module.buffers())
        return [*self.sample(args), *(tensor_of(args[index]) for index in self.weights), *held]


def tensor_of(value: object) -> torch.Tensor:
    """An argument that is a tensor."""
    assert isinstance(value, torch.Tensor)
    return value


def read_graph(module: fx.GraphModule) -> Graph:
    """The Dynamo graph with its arguments classified."""
    inputs: dict[int, str] = {}
    weights: dict[int, str] = {}
    numbers: list[int] = []
    places: dict[sympy.Basic, list[Place]] = {}
    symbolic: dict[int, sympy.Basic] = {}
    placeholders = module.graph.find_nodes(op="placeholder")
    single = len({root for node in placeholders if (root := _path(node)[0]) is not None}) < 2
    for index, node in enumerate(placeholders):
        value = node.meta["example_value"]
        if not isinstance(value, torch.Tensor):
            symbolic[index] = value.node.expr if isinstance(value, torch.SymInt) else sympy.nan
        elif _is_number(node):
            numbers.append(index)
        elif (path := _path(node))[0] is not None:
            weights[index] = _unique(path[1] if single else f"{path[0]}.{path[1]}", weights.values())
        else:
            inputs[index] = _unique(_input_name(node), inputs.values())
            for dim, size in enumerate(map(size_of, value.shape)):
                if isinstance(size, sympy.Symbol):
                    places.setdefault(size, []).append((inputs[index], dim))
    sizes = {index: places[symbol][0] for index, symbol in symbolic.items() if symbol in places}
    numbers += symbolic.keys() - sizes.keys()
    name = "Graph_" + str(CompileContext.current_compile_id()).replace("/", "_")
    return Graph(module, name, inputs, weights, sorted(numbers), sizes, [*places.values()])


def source_name(node: fx.Node) -> str:
    """The expression of the value in the caller's code, `L['self']._modules['0']._parameters['weight']`."""
    source = getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", node.name)
    return str(name() if callable(name) else name)


def _is_number(node: fx.Node) -> bool:
    """True for a Python float, which Dynamo passes as a tensor and reads with `item`."""
    packed = getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)
    return bool(packed) and node.meta["example_value"].dim() == 0 and all(user.target == "item" for user in node.users)


def _path(node: fx.Node) -> tuple[str | None, str]:
    """The module of a weight as the code names it, and the weight's name in it; None if the node is not a weight.

    A tensor in a plain attribute of a module is not a weight: modules keep values there that change between calls.
    """
    parts = re.findall(r"\.?(\w+)|\['([^']*)'\]", source_name(node).partition("[")[2])
    words = [word or quoted for word, quoted in parts if word != "__dict__"]
    first = next((index for index, word in enumerate(words) if word in _CONTAINERS), None)
    if first is None or words[-2] not in _CONTAINERS[:2] or not isinstance(node.meta["example_value"], torch.Tensor):
        return None, ""
    return "_".join(words[:first]), ".".join(word for word in words[first:] if word not in _CONTAINERS)


def _input_name(node: fx.Node) -> str:
    """`input_ids` for `L['kwargs']['input_ids']`, `args_0` for `L['args'][0]`."""
    words = re.findall(r"\w+", source_name(node).partition("[")[2])
    words = [word for word in words if word not in ("self", "kwargs")]
    first = max((index for index, word in enumerate(words) if not word.isdigit()), default=0)
    name = "_".join(words[first:]) or node.name
    return name if name.isidentifier() else f"input_{name}"


def _unique(name: str, used: Collection[str]) -> str:
    names = set(used)
    return next(other for index in range(len(names) + 1) if (other := name if not index else f"{name}_{index}") not in names)


def capture_graph(graph: Graph, args: Sequence[object]) -> Capture:
    """The graph as a program with the weights and numbers of these arguments. The program shares the weights' memory.

    Sizes that are dynamic in Dynamo are dynamic in the program.

    Raises:
        CaptureError: for a graph that a program cannot hold.
    """
    started = time.perf_counter()
    refuse(graph, args)
    with torch.inference_mode(False), torch.no_grad(), tracing(None), _same_levels():
        example = [ordinary(tensor) for tensor in graph.sample(args)]
        free = {id(tensor): dims for tensor, dims in zip(example, _free_dimensions(graph), strict=True)}
        module = _without_batching(bind(graph, args), example)
        program = capture_sizes(module, example, lambda tensor: free.get(id(tensor), {}), _refuse_effects)
    notes = [describe_dimensions(program.signature)]
    if any(str(node.target) in _WHOLE_LAYERS for node in program.nodes()):
        notes.append("layers of torch.nn come whole; torch.backends.mha.set_fastpath_enabled(False) lets passes into them")
    return Capture(program, example, tuple(notes), time.perf_counter() - started)


def refuse(graph: Graph, args: Sequence[object]) -> None:
    """Raise CaptureError for calls with gradients, autocast or unusual tensors, which programs do not support."""
    tensors = graph.tensors(args)
    differentiable = torch.is_grad_enabled() or any(
        node.target is torch._C._set_grad_enabled and node.args[0] for node in graph.module.graph.nodes
    )
    if differentiable and any(tensor.requires_grad for tensor in tensors):
        raise CaptureError("it may be asked for gradients, which a program does not give; call it under torch.no_grad()")
    casting = next((device for device in _CASTING if torch.is_autocast_enabled(device)), None)
    if casting is not None:
        raise CaptureError(
            f"torch.autocast('{casting}') is on, and a program's dtypes are fixed; use the pass cast, or model.to(dtype)"
        )
    odd = next((tensor for tensor in tensors if type(tensor) not in _PLAIN or tensor.layout is not torch.strided), None)
    if odd is not None:
        kind = type(odd).__name__ if type(odd) not in _PLAIN else str(odd.layout)
        raise CaptureError(f"it reads a tensor of the kind {kind}; a program has plain, dense tensors")


def _free_dimensions(graph: Graph) -> list[dict[int, object]]:
    """For each input, the dimensions that are dynamic in Dynamo; sizes that it specialized meanwhile are fixed."""
    return [
        {dim: Dim.AUTO for dim, size in enumerate(value.shape) if not isinstance(size_of(size), int)} for value in _fakes(graph)
    ]


def _fakes(graph: Graph) -> list[torch.Tensor]:
    placeholders = graph.module.graph.find_nodes(op="placeholder")
    return [placeholders[index].meta["example_value"] for index in graph.inputs]


def bind(graph: Graph, args: Sequence[object]) -> fx.GraphModule:
    """A module that takes only the graph's inputs; it holds the weights and numbers of these arguments."""
    bound = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    owned: dict[str, object] = {}
    placeholders = graph.module.graph.find_nodes(op="placeholder")
    for index, name in graph.inputs.items():
        copied[placeholders[index]] = bound.placeholder(name)
    by_name = {name: copied[placeholders[index]] for index, name in graph.inputs.items()}

    def size_at(name: str, dim: int) -> fx.Node:
        return bound.call_function(torch.ops.aten.sym_size.int, (by_name[name], dim))

    constants: dict[fx.Node, Any] = {}
    for index, node in enumerate(placeholders):
        value = args[index]
        if index in graph.weights:
            name = graph.weights[index]
            owned[name] = alias(tensor_of(value))
            copied[node] = bound.get_attr(name)
        elif index in graph.numbers:
            constants[node] = value.item() if isinstance(value, torch.Tensor) else value
        elif index not in graph.inputs:
            copied[node] = size_at(*graph.sizes[index])
    for first, *others in graph.equal:
        for other in others:
            # Dynamo uses one symbol for equal sizes. This check tells export, which could not always infer it from the graph.
            same = bound.call_function(operator.eq, (size_at(*first), size_at(*other)))
            bound.call_function(torch._check, (same,))
    for node in graph.module.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.target == "item" and nodes.operand(node) in constants:
            constants[node] = constants[nodes.operand(node)]
            continue
        copy = bound.node_copy(node, lambda used: constants[used] if used in constants else copied[used])
        if node.target is torch.sym_sum:
            copy.target = _sum_of_sizes
        copy.meta["nn_module_stack"] = _stack(node)
        copied[node] = copy
        if node.op in ("get_attr", "call_module"):
            owned[str(node.target)] = operator.attrgetter(str(node.target))(graph.module)
    return fx.GraphModule(owned, bound, class_name=graph.name)


def _without_batching(module: fx.GraphModule, example: Sample) -> fx.GraphModule:
    """The module with `torch.vmap` calls, such as the function of an associative scan, traced into batched operators.

    Dynamo keeps scans as one call, or writes the functorch calls that begin and end a vmap into its graph. These are not
    operators, and export would keep them. Tracing also decomposes other operators, so the program is longer than one captured
    without Dynamo, until passes raise the patterns they know.
    """
    if not any(map(_is_batching, module.graph.nodes)):
        return module
    traced = make_fx(module, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*example)
    for node, given in zip(traced.graph.find_nodes(op="placeholder"), module.graph.find_nodes(op="placeholder"), strict=True):
        node.name = node.target = given.name
    names = {id(value): name for name, value in [*module.named_parameters(), *module.named_buffers()]}
    owned: dict[str, object] = {}
    for node in traced.graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(str(node.target))(traced)
        node.target = names.get(id(value), node.target)
        owned[str(node.target)] = value
    return fx.GraphModule(owned, traced.graph, class_name=type(module).__name__)


def _is_batching(node: fx.Node) -> bool:
    made_in = getattr(node.target, "__module__", None) or ""
    return node.target is torch.ops.higher_order.associative_scan or made_in.startswith("torch._functorch")


@contextmanager
def _same_levels() -> Generator[None]:
    """Restore the stack of `torch.func` levels, which an error would leave deeper: Dynamo guards on it."""
    depth = functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def _sum_of_sizes(terms: Sequence[torch.SymInt]) -> torch.SymInt:
    """`torch.sym_sum` as binary additions, because programs have no other sums."""
    return reduce(operator.add, terms)


def _stack(node: fx.Node) -> dict[str, tuple[str, type]]:
    """The module stack of a node, with paths relative to the compiled module; Dynamo writes `L['self'].encoder`."""
    stack = node.meta.get("nn_module_stack", {})
    return {key: (re.sub(r"^\w(\[[^\]]*\])+\.?", "", str(path)), kind) for key, (path, kind) in stack.items()}


def _refuse_effects(program: Program) -> None:
    """Raise CaptureError for a program that writes buffers or draws random numbers."""
    if program.state:
        raise CaptureError(f"it writes to the buffer '{program.state[0]}' of its module")
    random = next((node for node in program.nodes() if _is_random(node)), None)
    if random is not None:
        where = nodes.origin(random).source or "an unknown line"
        raise CaptureError(
            f"{random.target} at {where} draws random numbers; call model.eval() if it is to be used for inference"
        )


def _is_random(node: fx.Node) -> bool:
    """True for calls that draw random numbers; disabled dropout does not."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    named = {argument.name: nodes.argument(node, argument.name) for argument in node.target._schema.arguments}
    off = any(named.get(name, True) is False for name in ("train", "training"))
    return not off and all(named.get(name, 1.0) != 0.0 for name in ("p", "dropout_p", "dropout"))


def guard_sizes(graph: Graph, signature: Signature) -> None:
    """Add Dynamo guards for every size the program fixes, and for its bounds and conditions."""
    shapes = [(value.shape, leaf.type.shape) for value, leaf in zip(_fakes(graph), signature.tensors, strict=True)]
    pairs = [pair for given, captured in shapes for pair in zip(given, captured, strict=True)]
    varying = [(given, size) for given, size in pairs if isinstance(given, torch.SymInt)]
    known: dict[sympy.Symbol, torch.SymInt] = {}
    for given, size in varying:
        if isinstance(size, sympy.Symbol):
            known.setdefault(size, given)
    for given, size in varying:
        _hold(given, sympy.Eq(given.node.expr, _in_dynamo(known, size)))
    for symbol, given in known.items():
        dimension, expression = signature.dimensions[symbol], given.node.expr
        # Dynamo itself specializes sizes 0 and 1.
        if dimension.minimum > 2:
            _hold(given, sympy.Ge(expression, dimension.minimum))
        if dimension.maximum is not None:
            _hold(given, sympy.Le(expression, dimension.maximum))
    for condition in signature.conditions:
        _hold(next(iter(known.values())), _in_dynamo(known, condition))


def _in_dynamo(known: Mapping[sympy.Symbol, torch.SymInt], size: int | sympy.Basic) -> sympy.Basic:
    """A size or a condition of the program, written with Dynamo's symbols."""
    return sympy.sympify(size).xreplace({symbol: given.node.expr for symbol, given in known.items()})


def _hold(given: torch.SymInt, condition: sympy.Basic) -> None:
    """Guard on the condition: it holds for the current sizes, and Dynamo will use this graph only if it holds."""
    given.node.shape_env.evaluate_expr(condition)
