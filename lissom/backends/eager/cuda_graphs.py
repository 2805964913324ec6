"""CUDA graphs: a program's kernels, captured once per input shape and replayed by one launch.

A call copies its inputs to the graph's static inputs, replays, and copies the outputs out, without synchronization. Graphs
share a memory pool, which is safe as they never run concurrently: calls of other threads and streams are ordered by an event.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

import torch
from torch import fx

from lissom.backends.base import Executable
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import CONVOLUTIONS
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.ops import block_sparse_attention

aten = torch.ops.aten

GRAPHS = 16
"""The number of graphs kept; the least recently used is dropped."""
_SHAPES = 64
"""The number of shapes remembered that were seen once."""
_SYNCHRONISING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# One capture at a time in a process.
_CAPTURE = Lock()

Shapes = tuple[torch.Size, ...]


class CudaGraphs:
    """Runs a function of flat inputs on one device through CUDA graphs.

    A shape runs without a graph the first time, and is captured the second time, so that unique shapes cost nothing.

    Attributes:
        notes: why there are no graphs, where there are none.
    """

    def __init__(self, function: Executable, device: torch.device, obstacle: str | None = None) -> None:
        self.notes: tuple[str, ...] = (f"no CUDA graphs: {obstacle}",) if obstacle else ()
        self._function = function
        self._device = device
        self._lock = Lock()
        self._seen: OrderedDict[Shapes, None] = OrderedDict()
        self._graphs: OrderedDict[Shapes, _Graph] = OrderedDict()
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()
            self._done = torch.cuda.Event()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[object]:
        shapes = tuple(tensor.shape for tensor in inputs)
        with torch.inference_mode(), torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():
                return self._function(inputs)
            with self._lock:
                graph = self._find(shapes, inputs)
                if graph is not None:
                    return self._replay(graph, inputs)
            return self._function(inputs)

    def _find(self, shapes: Shapes, inputs: Sequence[torch.Tensor]) -> _Graph | None:
        """The graph for these shapes, captured now if they were seen before; None to run without one."""
        if self.notes:
            return None
        if shapes in self._graphs:
            self._graphs.move_to_end(shapes)
            return self._graphs[shapes]
        if shapes not in self._seen:
            self._seen[shapes] = None
            if len(self._seen) > _SHAPES:
                self._seen.popitem(last=False)
            return None
        # The last replay may still read what is freed below.
        self._done.synchronize()
        while len(self._graphs) >= GRAPHS:
            self._graphs.popitem(last=False)
        graph = self._capture(inputs)
        if graph is not None:
            self._graphs[shapes] = graph
        return graph

    def _capture(self, inputs: Sequence[torch.Tensor]) -> _Graph | None:
        current = torch.cuda.current_stream()
        static = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]
        self._stream.wait_stream(current)
        # Libraries initialize at their first call, which must not be captured. An error here is the caller's.
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                self._function(static)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                _CAPTURE,
                torch.cuda.stream(current),  # a failed capture leaves its own stream the current one
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                outputs = self._function(static)
        except RuntimeError as error:
            self.notes = (f"no CUDA graphs: {str(error).partition(chr(10))[0]}",)
            return None
        return _Graph(graph, static, outputs)

    def _replay(self, graph: _Graph, inputs: Sequence[torch.Tensor]) -> list[object]:
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)
        for static, given in zip(graph.inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        graph.graph.replay()
        outputs = [value.clone() if isinstance(value, torch.Tensor) else value for value in graph.outputs]
        self._done.record(stream)
        return outputs


class _Graph(NamedTuple):
    """A captured graph with its static inputs and outputs."""

    graph: torch.cuda.CUDAGraph
    inputs: Sample
    outputs: Sequence[object]


def with_graphs(program: Program, function: Executable) -> Executable:
    """The executable, through CUDA graphs where all inputs are on one CUDA device."""
    device = _device_of(program)
    return function if device is None else CudaGraphs(function, device, obstacle(program))


def obstacle(program: Program) -> str | None:
    """The reason the program cannot be captured, in words; None if it can.

    It must have no state, which capture would advance, and no operator that synchronizes the device.
    """
    if program.state:
        return f"the program writes to '{program.state[0]}'"
    for node in program.nodes():
        tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
        if not _SYNCHRONISING.isdisjoint(tags) and not _reads_integers(node):
            return f"{node.name} depends on values, which the host would have to wait for"
        if _computes_layout(node):
            return f"{node.name} has a layout that is computed, and the host reads it"
        if any(_crosses(used, node) for used in node.all_input_nodes):
            return f"{node.name} moves a tensor between devices"
    return None


def _computes_layout(node: fx.Node) -> bool:
    """True for block-sparse attention with a computed layout; blocks of a weight's layout are listed once."""
    layout = nodes.argument(node, "layout") if node.target is block_sparse_attention else None
    return isinstance(layout, fx.Node) and layout.op != "get_attr"


def _reads_integers(node: fx.Node) -> bool:
    """True for indexing by integers, whose shape is known; indexing by a boolean mask is the same operator."""
    indices = [used for used in node.all_input_nodes[1:] if nodes.is_tensor(used)]
    return node.target is aten.index.Tensor and all(nodes.tensor_type(used).dtype is not torch.bool for used in indices)


def _crosses(used: fx.Node, node: fx.Node) -> bool:
    """True when a value is copied between devices; a CPU scalar is a kernel argument."""
    if not (nodes.is_tensor(used) and nodes.is_tensor(node)):
        return False
    left, right = nodes.tensor_type(used), nodes.tensor_type(node)
    copies = node.target in (aten._to_copy.default, aten.to.device, aten.to.dtype_layout, aten.copy.default)
    return left.device != right.device and (left.device.type != "cpu" or left.rank > 0 or copies)


def with_fast_layout(program: Program) -> Program:
    """A program on CUDA with contiguous weights, and channels-last weights of two-dimensional convolutions.

    The caller's model keeps its layout. Programs on other devices are returned unchanged.
    """
    if _device_of(program) is None:
        return program
    weights = [nodes.argument(node, "weight") for node in program.nodes(*CONVOLUTIONS, aten.convolution.default)]
    convolved = {weight.name for weight in weights if isinstance(weight, fx.Node)}
    placed = program.copy()
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor = program.weight(str(node.target)).detach()
        last = node.name in convolved and tensor.dim() == 4
        layout = torch.channels_last if last else torch.contiguous_format
        if not tensor.is_contiguous(memory_format=layout) and str(node.target) not in program.state:
            placed.set_weight(str(node.target), tensor.contiguous(memory_format=layout))
    return placed


def _device_of(program: Program) -> torch.device | None:
    """The CUDA device of all inputs; None where they are elsewhere."""
    devices = {leaf.type.device for leaf in program.signature.tensors}
    return devices.pop() if len(devices) == 1 and all(device.type == "cuda" for device in devices) else None
