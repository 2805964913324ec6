"""A session of ONNX Runtime as an executable: flat inputs and outputs, and state, all without copies."""

from __future__ import annotations

import shutil
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir import tensor_adapters
from torch import fx

from lissom.backends.exported import device_of, leaves_of
from lissom.backends.microbatches import Cutting
from lissom.backends.names import input_names, output_names, results_of, state_names
from lissom.backends.onnx.state import shared_states
from lissom.backends.onnxruntime.stored import check_interface
from lissom.backends.simulated_layers import SimulatedLayer
from lissom.compiler.ir.calls import Embedding
from lissom.compiler.ir.program import Program
from lissom.errors import InputError, UnsupportedError, nearest

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
LEVELS: Mapping[str, onnxruntime.GraphOptimizationLevel] = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

# ONNX Runtime places computations of sizes on the CPU on purpose.
_OF_SIZES = {
    *("Shape", "Size", "Gather", "Concat", "Slice", "Unsqueeze", "Squeeze", "Cast"),
    *("Add", "Sub", "Mul", "Div", "Mod", "Range", "Equal", "Where"),
}


class Memory:
    """The memory of a state: `now`, and `next`, which a call writes; the same tensor where that is safe."""

    def __init__(self, tensor: torch.Tensor, past: str, present: str, shape: Sequence[int], shared: bool) -> None:
        self.names = (past, present)
        self.now = tensor.detach().clone(memory_format=torch.contiguous_format)
        self.next = self.now if shared else torch.empty_like(self.now)
        self.dtype = int(tensor_adapters.from_torch_dtype(tensor.dtype))
        # Of the model's input, which may have fewer dimensions.
        self.shape = list(shape)


class Session:
    """An ONNX model that ONNX Runtime opened. Calls from several threads are independent, unless there is state.

    Attributes:
        path: the model's file; weights are in the same folder, which is deleted with this object, unless `keep`.
        notes: sentences for the history.
        cutting: how large batches are split into microbatches; None to run them whole.
        quantized: how many layers are quantized.
        simulated: those of them that run in floating point.
    """

    def __init__(
        self, program: Program, path: Path, session: onnxruntime.InferenceSession, notes: Sequence[str] = (), keep: bool = False
    ) -> None:
        self.path = path
        self.notes = tuple(notes)
        self.cutting: Cutting | None = None
        self.quantized = 0
        self.simulated: Sequence[SimulatedLayer] = ()
        self._session = session
        self._device = device_of(program)
        self._inputs = input_names(program)
        self._results = output_names(program)
        self._dtypes = [leaf.type.dtype for leaf in program.signature.tensors]
        self._types = [int(tensor_adapters.from_torch_dtype(dtype)) for dtype in self._dtypes]
        # The device of tensors: a CPU without an index, any other device with one.
        self._place = self._device if self._device.type == "cpu" else torch.device(self._device.type, self._device.index or 0)
        # ONNX wraps negative indices of an embedding around, and PyTorch refuses them.
        rows = [Embedding(node).ids for node in program.nodes(*Embedding.targets)]
        self._rows = [index for index, node in enumerate(program.placeholders) if node in rows]
        # The flat outputs: the index of a result, or a constant.
        places = {result: index for index, result in enumerate(results_of(program))}
        self._leaves = [(places[leaf], None) if isinstance(leaf, fx.Node) else (None, leaf) for leaf in leaves_of(program)]
        check_interface(program, path, session)
        self._memories = _memories(program, path, session) if program.state else {}
        if not keep:
            weakref.finalize(self, shutil.rmtree, path.parent, ignore_errors=True)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[object]:
        results = self.run(inputs) if self.cutting is None else self.cutting(self.run, inputs)
        return [constant if place is None else results[place] for place, constant in self._leaves]

    def state(self) -> dict[str, torch.Tensor]:
        """The state by name: memory that ONNX Runtime reads, valid until the next call. Writing to a tensor changes the state.

        Undefined after a call that failed.
        """
        return {name: memory.now for name, memory in self._memories.items()}

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The model's outputs for flat inputs, without microbatches.

        Raises:
            InputError: for an input of another dtype, or on another device, whose memory would be misread.
        """
        for name, tensor, dtype in zip(self._inputs, inputs, self._dtypes, strict=True):
            if tensor.dtype is not dtype or tensor.device != self._place:
                given = f"{tensor.dtype} on {tensor.device}"
                raise InputError(f"input '{name}' is {given}, and the model takes {dtype} on {self._place}; convert it first")
        kind, index = self._device.type, self._device.index or 0
        binding = self._session.io_binding()
        # Kept alive until the call returns: the binding holds only their addresses.
        held = [tensor.detach().resolve_neg().contiguous() for tensor in inputs]
        for name, tensor, dtype in zip(self._inputs, held, self._types, strict=True):
            binding.bind_input(name, kind, index, dtype, list(tensor.shape), tensor.data_ptr())
        for name in self._results:
            binding.bind_output(name, kind, index)
        for memory in self._memories.values():
            past, present = memory.names
            binding.bind_input(past, kind, index, memory.dtype, memory.shape, memory.now.data_ptr())
            binding.bind_output(present, kind, index, memory.dtype, memory.shape, memory.next.data_ptr())
        if kind == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        elif any(held[index].numel() and int(held[index].min()) < 0 for index in self._rows):
            raise RuntimeError("a row of a table is negative")
        try:
            self._session.run_with_iobinding(binding)
        # Its errors have no common class. A RuntimeError makes the caller check indices against embedding tables.
        except Exception as error:
            raise RuntimeError(str(error)) from error
        for memory in self._memories.values():
            memory.now, memory.next = memory.next, memory.now
        return [torch.from_dlpack(value) for value in binding.get_outputs()[: len(self._results)]]


def _memories(program: Program, path: Path, session: onnxruntime.InferenceSession) -> dict[str, Memory]:
    """Memory for each state, initialized with the program's."""
    past, present = state_names(program)
    shapes = {argument.name: argument.shape for argument in session.get_inputs()}
    shared = shared_states(ir.load(path), past, present)
    return {
        name: Memory(program.weight(name), before, after, shapes[before], in_place)
        for name, before, after, in_place in zip(program.state, past, present, shared, strict=True)
    }


@dataclass(frozen=True)
class SessionOptions:
    """Options of a session.

    Attributes:
        providers: with their options; the first that supports a node runs it.
        threads: per operator.
        arena: as in `OnnxRuntime`.
        optimization: as in `OnnxRuntime`.
    """

    providers: Sequence[tuple[str, Mapping[str, str]]]
    threads: int
    arena: bool = True
    optimization: str = "all"


def open_session(
    path: Path, chosen: SessionOptions, optimized: Path | None = None, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """Open a model.

    Args:
        optimized: the file to write the optimized graph to, with its weights next to it.
        profile: the beginning of the file that `end_profiling` writes the times of all operators to.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = chosen.threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = chosen.arena
    options.graph_optimization_level = LEVELS[chosen.optimization]
    # Errors only: its warnings are about its own optimizations.
    options.log_severity_level = 3
    # Keep quantization as in the model: otherwise activations of weight-only layers may be quantized too.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Without VNNI its fastest uint8 × int8 products saturate, which is wrong; this selects those that do not.
    options.add_session_config_entry("session.x64quantprecision", "1")
    # Threads do not spin between calls.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if chosen.providers[0][0] != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{optimized.name}.data")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(path, options, providers=[(name, dict(given)) for name, given in chosen.providers])


def session_of(program: Program, path: Path, options: SessionOptions, keep: bool = False) -> Session:
    """A `Session` of a program's model.

    Args:
        keep: leave the model's folder when the session is deleted.
    """
    session = open_session(path, options)
    first = options.providers[0][0]
    warning = fallen_back(placed_nodes(session), first) if first != CPU else None
    return Session(program, path, session, [warning] if warning else [], keep)


def optimized_operators(path: Path, chosen: SessionOptions, folder: Path) -> Counter[str]:
    """The operators of the graph that ONNX Runtime optimizes a model to, with counts.

    Args:
        folder: for a temporary file.
    """
    file = folder / "optimized.onnx"
    open_session(path, chosen, file)
    return Counter(node.op_type for node in ir.load(file).graph.all_nodes())


def choose_providers(
    program: Program, wanted: Sequence[str], options: Mapping[str, Mapping[str, str]]
) -> list[tuple[str, Mapping[str, str]]]:
    """The execution providers and their options: those wanted, by default CUDA for a program on CUDA, then the CPU.

    Raises:
        UnsupportedError: when one is not installed.
    """
    installed = onnxruntime.get_available_providers()
    device = device_of(program)
    names = list(wanted) or ([CUDA] if device.type == "cuda" else []) + [CPU]
    listed = ", ".join(installed)
    for name in names:
        if name in installed:
            continue
        if not wanted:
            raise UnsupportedError(
                f"{program.name} is on {device}, and the onnxruntime installed has {listed} only; "
                f"pip install 'lissom[onnx-gpu]' in its place, or compile with device='cpu'"
            )
        raise UnsupportedError(
            f"there is no execution provider '{name}' here{nearest(name, installed) or ';'} onnxruntime has {listed}"
        )
    unused = next((name for name in options if name not in names), None)
    if unused is not None:
        raise UnsupportedError(f"provider_options names '{unused}', which is not among the providers {', '.join(names)}")
    given = {CUDA: {"device_id": str(device.index or 0)}} if device.type == "cuda" else {}
    return [(name, {**given.get(name, {}), **options.get(name, {})}) for name in names]


def fallen_back(nodes: Iterable[tuple[str, str]], first: str) -> str | None:
    """A warning about nodes, given as provider and operator, that fall back to the CPU from the provider `first`."""
    left = Counter(operator for provider, operator in nodes if provider == CPU and operator not in _OF_SIZES)
    if first == CPU or not left:
        return None
    listed = ", ".join(f"{operator} ({count})" for operator, count in left.most_common())
    return f"{first} does not run all: {listed} run on the CPU, and what they read and give crosses the bus"


def placed_nodes(session: onnxruntime.InferenceSession) -> list[tuple[str, str]]:
    """Provider and operator of every node, as recorded when the session was opened; empty for versions without the record."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return []
    return [(part.ep_name, node.op_type) for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
