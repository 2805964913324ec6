"""Eager PyTorch: the flat program as one Python function that calls one operator a line, on any device PyTorch has.

There are no modules, hooks or attributes between two operators; each value is freed after its last use. On a CPU, operators
that the library of kernels can call one after the other are one line (`chains.py`). Calls from several threads are
independent unless the program has state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from keyword import iskeyword
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import fx

from lissom.backends.base import Backend, Executable, confirm
from lissom.backends.eager.chains import Chain, runs_of
from lissom.backends.eager.cuda_graphs import with_fast_layout, with_graphs
from lissom.backends.eager.methods import METHODS
from lissom.backends.eager.node_times import time_nodes
from lissom.compiler.ir.node import overload
from lissom.compiler.ir.operators import PACKED_LINEARS, QUANTIZED_LINEARS
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.memory import copies, use_huge_pages
from lissom.compiler.paging import take_home
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.inspect.hot_layers import LayerTimes, layer_times
from lissom.measure.machine import Machine
from lissom.ops import KERNELS
from lissom.ops.native import load_kernels, one_call
from lissom.ops.triton_kernels import has_kernels
from lissom.passes.canonical.fold_constants import FoldConstants
from lissom.passes.lowering.fuse_attention import FuseAttention
from lissom.passes.lowering.fuse_epilogues import FuseEpilogues
from lissom.passes.lowering.fuse_merged_attention import FuseMergedAttention
from lissom.passes.lowering.fuse_norm import FuseNorm
from lissom.passes.lowering.fuse_rotary import FuseRotary
from lissom.passes.lowering.fuse_unpadded_attention import FuseUnpaddedAttention
from lissom.passes.lowering.lower_quantized_products.lower_quantized_products import LowerQuantizedProducts
from lissom.passes.lowering.lower_sparse_attention import LowerSparseAttention
from lissom.passes.lowering.merge_projections import MergeProjections
from lissom.passes.lowering.pack_linear import PackLinear
from lissom.passes.lowering.pack_quantized_linear import PackQuantizedLinear
from lissom.passes.lowering.pack_sparse import PackSparse
from lissom.passes.lowering.split_gates import SplitGates
from lissom.passes.lowering.write_state_in_place import WriteStateInPlace
from lissom.passes.quantize.fold_quantized_weights import FoldQuantizedWeights

Calls = Callable[[fx.Node], Callable[..., object] | None]
"""A replacement of a node's target; None for the target itself."""


class Eager(Backend):
    """Runs the program's operators one after the other."""

    name: ClassVar[str] = "eager"
    movable: ClassVar[bool] = True

    def lowering(self, device: torch.device) -> Sequence[Pass]:
        if device.type == "cuda":
            triton = has_kernels(device)
            products = (PackSparse(), FoldQuantizedWeights(), LowerQuantizedProducts(triton=triton))
            epilogues = (FuseEpilogues(),) if triton else ()
            return (FoldConstants(shared=True), LowerSparseAttention(), *products, *epilogues, WriteStateInPlace())
        if device.type != "cpu":
            return (FoldConstants(shared=True), WriteStateInPlace())
        # Without kernels the later passes say why; merged projections would then be read as strided slices.
        merge = () if load_kernels() else (MergeProjections(always=True, gates=False),)
        heads = (FuseRotary(), LowerSparseAttention(), FuseAttention())
        products = (SplitGates(), PackQuantizedLinear(), PackSparse(), PackLinear(), FuseEpilogues(), FuseNorm())
        lookups = (FuseUnpaddedAttention(), FuseMergedAttention(), WriteStateInPlace())
        return (FoldConstants(shared=True), FoldQuantizedWeights(), *merge, *heads, *products, *lookups)

    def build(self, program: Program, example: Sample) -> Executable:
        return build_function(program, with_graphs)

    def confirm(self, executable: Executable, program: Program, example: Sample) -> None:
        confirm(self.name, executable, program, example)

    def settle(self, program: Program) -> None:
        settle_weights(program)

    def time_layers(
        self,
        program: Program,
        executable: Executable,
        sample: Sample,
        *,
        seconds: float,
        machine: Machine | None,
        measured: Collection[str] = (),
    ) -> LayerTimes:
        if any(tensor.device.type != "cpu" for tensor in (*sample, *program.weights().values())):
            return super().time_layers(program, executable, sample, seconds=seconds, machine=machine)
        milliseconds = time_nodes(program, sample, seconds)
        return layer_times(program, sample, milliseconds, machine, backend=self.name, measured=measured)

    def save_files(self, executable: Executable, folder: Path) -> None:
        """No files: the program is enough."""

    def load_executable(self, program: Program, folder: Path) -> Executable:
        executable = build_function(program, with_graphs)
        settle_weights(program, behind=True)
        return executable


def build_function(
    program: Program,
    wrap: Callable[[Program, Executable], Executable] = lambda _, run: run,
    calls: Calls = lambda _: None,
) -> Executable:
    """An executable that runs the program's operators in order.

    Args:
        wrap: applied to the function.
        calls: as in `emit`.
    """
    program = with_fast_layout(program)
    state = copies({name: program.weight(name) for name in program.state})
    take_home(program.weights().values())
    use_huge_pages([], own=[*_packed(program), *state.values()])
    source, names = emit(program, state, calls)
    scope = dict(names)
    exec(compile(source, "<lissom program>", "exec"), scope)
    function = cast(Callable[..., Sequence[object]], scope["run"])

    def run(inputs: Sequence[torch.Tensor]) -> Sequence[object]:
        with torch.inference_mode():
            return function(*inputs)

    if program.nodes(*KERNELS) and not load_kernels():
        run = one_call(run)
    executable = wrap(program, run)
    return _Stateful(executable, state) if state else executable


def settle_weights(program: Program, *, behind: bool = False) -> None:
    """Put the weights that a call reads whole into huge pages; of tables of embeddings it looks up a few rows.

    Args:
        behind: return before, and make them during the first calls.
    """
    reads = (node for node in program.graph.nodes if node.op == "get_attr" and str(node.target) not in program.state)
    names = {str(node.target) for node in reads if any(user.target is not _EMBEDDING for user in node.users)}
    use_huge_pages([program.weight(name) for name in names], behind=behind)


def _packed(program: Program) -> list[torch.Tensor]:
    """The weights that were packed for kernels, and their grids: they are the program's own."""
    packed: dict[str, torch.Tensor] = {}
    for call in program.nodes(*PACKED_LINEARS, *QUANTIZED_LINEARS):
        for parameter, argument in zip(overload(call)._schema.arguments, call.args, strict=False):
            if parameter.name in _PACKED and isinstance(argument, fx.Node) and argument.op == "get_attr":
                packed[str(argument.target)] = program.weight(str(argument.target))
    return list(packed.values())


_EMBEDDING = torch.ops.aten.embedding.default
_PACKED = ("weight", "places", "ends", "scale", "sums", "zero_point")
"""Parameters of linear layers."""


class _Stateful:
    """A function of flat inputs that keeps state: the tensors it writes."""

    def __init__(self, function: Executable, tensors: dict[str, torch.Tensor]) -> None:
        self.notes: Sequence[str] = getattr(function, "notes", ())
        self._function = function
        self._tensors = tensors

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[object]:
        return self._function(inputs)

    def state(self) -> dict[str, torch.Tensor]:
        """The state by name: the tensors that calls read and write."""
        return dict(self._tensors)


def emit(
    program: Program, state: Mapping[str, torch.Tensor] | None = None, calls: Calls = lambda _: None
) -> tuple[str, dict[str, object]]:
    """The program as the source of a function `run`, and the globals of the source.

    Operators that a chain can call are one line together.

    The source contains no text of the program, which may be untrusted: variables are numbered, strings and names are globals,
    and keywords are those of the operator's schema.

    Args:
        state: replaces the program's state, by name.
        calls: replaces targets of nodes.
    """
    names: dict[str, object] = {}
    scope: dict[fx.Node, str] = {}

    def weight(name: str) -> torch.Tensor:
        return state[name] if state and name in state else program.weight(name).detach()

    for node in program.graph.nodes:
        if node.op == "get_attr":
            scope[node] = f"w{len(names)}"
            names[scope[node]] = weight(str(node.target))
        elif node.op == "placeholder":
            scope[node] = f"v{len(scope)}"
    header = f"def run({', '.join(scope[node] for node in program.placeholders)}):"
    lines: list[str] = []
    for run in runs_of(program, lambda node: calls(node) is not None):
        scope |= {node: f"v{place}" for place, node in enumerate(run.outputs, len(scope))}
        if run.native:
            made = f"[{', '.join(scope[node] for node in run.outputs)}]"
            chain = f"k{len(names)}"
            names[chain] = Chain(run, weight)
            read = [[scope[node] for node in nodes] for nodes in (run.tensors, run.numbers)]
            call = f"{chain}([{', '.join(read[0])}], [{', '.join(read[1])}])"
        else:
            [node] = run.nodes
            made, call = scope[node], _call(node, scope, names, calls)
        lines.append(f"    {made} = {call}")
        freed = [scope[node] for node in run.freed]
        if freed:
            lines.append(f"    del {', '.join(freed)}")
    result = _argument(program.graph.output_node().args[0], scope, names)
    return "\n".join([header, *lines, f"    return {result}", ""]), names


def _call(node: fx.Node, scope: dict[fx.Node, str], names: dict[str, object], calls: Calls) -> str:
    function = f"f{len(names)}"
    names[function] = calls(node) or METHODS.get(node.target, node.target)
    arguments = [_argument(argument, scope, names) for argument in node.args]
    arguments += [_named(node, key, _argument(argument, scope, names), names) for key, argument in node.kwargs.items()]
    return f"{function}({', '.join(arguments)})"


def _named(node: fx.Node, key: str, value: str, names: dict[str, object]) -> str:
    """A keyword argument: a keyword of the operator's schema, or without a schema one from the globals."""
    schema = getattr(node.target, "_schema", None)
    known = {parameter.name for parameter in schema.arguments} if schema is not None else set[str]()
    keyword = next((name for name in known if name == key and name.isidentifier() and not iskeyword(name)), None)
    if keyword is not None:
        return f"{keyword}={value}"
    name = f"c{len(names)}"
    names[name] = key
    return f"**{{{name}: {value}}}"


def _argument(argument: object, scope: dict[fx.Node, str], names: dict[str, object]) -> str:
    if isinstance(argument, fx.Node):
        return scope[argument]
    if isinstance(argument, list):
        return "[" + ", ".join(_argument(part, scope, names) for part in argument) + "]"
    if isinstance(argument, tuple):
        return "(" + "".join(_argument(part, scope, names) + ", " for part in argument) + ")"
    if argument is None or isinstance(argument, (bool, int)) or (isinstance(argument, float) and math.isfinite(argument)):
        return repr(argument)
    name = f"c{len(names)}"
    names[name] = argument
    return name
