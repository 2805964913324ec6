"""A network that OpenVINO compiled, as an executable: flat inputs and outputs."""

from __future__ import annotations

import shutil
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import openvino
import torch
from torch import fx

from lissom.backends.exported import kind_and_reason, leaves_of
from lissom.backends.names import input_names, output_names, results_of, state_names
from lissom.backends.openvino.executed import kernels, unfused
from lissom.backends.openvino.indices import OUTSIDE
from lissom.backends.openvino.integers import Quantized
from lissom.backends.simulated_layers import SimulatedLayer, account
from lissom.compiler.analysis.embedding_bounds import vocabulary_size
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.errors import ArtifactError, InputError
from lissom.ops.quantization import GROUP

TYPES: Mapping[torch.dtype, openvino.Type] = {
    torch.float32: openvino.Type.f32,
    torch.float16: openvino.Type.f16,
    torch.bfloat16: openvino.Type.bf16,
    torch.float64: openvino.Type.f64,
    torch.int64: openvino.Type.i64,
    torch.int32: openvino.Type.i32,
    torch.int16: openvino.Type.i16,
    torch.int8: openvino.Type.i8,
    torch.uint8: openvino.Type.u8,
    torch.bool: openvino.Type.boolean,
}
GROUP_SIZE = ("runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
"""Where an IR says in which groups OpenVINO quantizes activations; OpenVINO itself reads it too."""
_LEAST, _LARGEST = -(2**31), 2**31 - 1
"""The integers that OpenVINO computes with on a CPU."""


class Memory:
    """The memory of a state: `now`, and `next`, which a call writes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.now = tensor.detach().clone(memory_format=torch.contiguous_format)
        self.next = torch.empty_like(self.now)


class Network:
    """An IR that OpenVINO compiled. Calls from several threads are independent, unless there is state: each takes an infer
    request of its own.

    Attributes:
        path: the IR's .xml; its weights are beside it.
        notes: sentences for the history.
        quantized: how many layers are quantized.
        simulated: those of them that run in floating point.
    """

    def __init__(self, program: Program, path: Path, compiled: openvino.CompiledModel) -> None:
        self.path = path
        self.compiled = compiled
        self.notes: tuple[str, ...] = ()
        self.quantized = 0
        self.simulated: Sequence[SimulatedLayer] = ()
        self._inputs = input_names(program)
        leaves = program.signature.tensors
        self._dtypes = [leaf.type.dtype for leaf in leaves]
        # A lookup beyond a table gives zeros in OpenVINO, and negative indices wrap around.
        self._rows = [vocabulary_size(program, leaf.path) for leaf in leaves]
        results = results_of(program)
        self._results = [nodes.tensor_type(result).dtype for result in results]
        # The flat outputs: the index of a result, or a constant.
        places = {result: index for index, result in enumerate(results)}
        self._leaves = [(places[leaf], None) if isinstance(leaf, fx.Node) else (None, leaf) for leaf in leaves_of(program)]
        self._memories = {name: Memory(program.weight(name)) for name in program.state}
        self._outside = len(compiled.outputs) - 1 if _says_outside(compiled) else None
        self._idle: deque[openvino.InferRequest] = deque()

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[object]:
        self._check(inputs)
        try:
            request = self._idle.pop()
        except IndexError:
            request = self.compiled.create_infer_request()
        held = [tensor.detach().resolve_neg().contiguous() for tensor in inputs]
        for index, tensor in enumerate(held):
            request.set_input_tensor(index, shared(tensor))
        for index, memory in enumerate(self._memories.values()):
            request.set_input_tensor(len(held) + index, shared(memory.now))
            request.set_output_tensor(len(self._results) + index, shared(memory.next))
        # Its errors have no common class. A RuntimeError makes the caller check indices against embedding tables.
        try:
            request.infer()
        except Exception as error:
            raise RuntimeError(reason_of(error)) from error
        if self._outside is not None and request.get_output_tensor(self._outside).data.any():
            raise IndexError("an index to copy rows to is out of range; state is left as it was")
        # Copies, since the next call with this request writes to its outputs.
        results = [_copied(request.get_output_tensor(index), dtype) for index, dtype in enumerate(self._results)]
        self._idle.append(request)
        for memory in self._memories.values():
            memory.now, memory.next = memory.next, memory.now
        return [constant if place is None else results[place] for place, constant in self._leaves]

    def state(self) -> dict[str, torch.Tensor]:
        """The state by name: memory that OpenVINO reads, valid until the next call. Writing to a tensor changes the state."""
        return {name: memory.now for name, memory in self._memories.items()}

    def set_layers(self, quantized: Quantized) -> None:
        """Set `quantized` and `simulated` from the graph that OpenVINO executes."""
        if quantized.layers:
            self.quantized, self.simulated = len(quantized.layers), unfused(self.compiled.get_runtime_model(), quantized)
            self.notes = (account(self.simulated, self.quantized, kernels(quantized, self.simulated)),)

    def delete_with(self, folder: Path) -> None:
        """Delete the folder of the IR with this object."""
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def _check(self, inputs: Sequence[torch.Tensor]) -> None:
        for name, tensor, dtype, rows in zip(self._inputs, inputs, self._dtypes, self._rows, strict=True):
            if tensor.dtype is not dtype or tensor.device.type != "cpu":
                given = f"{tensor.dtype} on {tensor.device}"
                raise InputError(f"input '{name}' is {given}, and the model takes {dtype} on cpu; convert it first")
            if (dtype is not torch.int64 and rows is None) or not tensor.numel():
                continue
            low, high = (int(bound) for bound in tensor.aminmax())
            if rows is not None and (low < 0 or high >= rows):
                raise IndexError(f"input '{name}' holds {low if low < 0 else high}, and its table has {rows} rows")
            if low < _LEAST or high > _LARGEST:
                raise InputError(
                    f"input '{name}' holds {low if low < _LEAST else high}, and OpenVINO computes integers in 32 bits; "
                    f"choose backend 'eager'"
                )


@cache
def core() -> openvino.Core:
    """OpenVINO, which is kept until the process ends.

    For tiles its CPU plugin gives the thread that loads it a stack for signals. It frees that stack when it is unloaded, and a
    Ctrl-C then ends the process if another thread unloaded it (OpenVINO 2026.4).
    """
    return openvino.Core()


def open_network(program: Program, path: Path, threads: int) -> Network:
    """Read and compile an IR for the CPU. Raises ArtifactError when its inputs or outputs are not the program's."""
    model = core().read_model(path)
    _check_interface(program, path, model)
    _check_states(program, path, model)
    return Network(program, path, core().compile_model(model, "CPU", options_of(program, threads, _group_of(path, model))))


def options_of(program: Program, threads: int, group: int) -> dict[str, str]:
    """The options of OpenVINO, every one that could change the outputs among them.

    By default OpenVINO computes float32 in bfloat16 on processors that have it, and quantizes the activations of layers with
    integer weights.

    Args:
        group: the size of the groups in which activations of layers with integer weights are quantized; 0 where they are not.
    """
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        # PyTorch's threads run on the same cores.
        "ENABLE_CPU_PINNING": "NO",
        "INFERENCE_PRECISION_HINT": _precision(program),
        GROUP_SIZE[1]: str(group),
        # No cache of compiled models, which would be read without a check.
        "CACHE_DIR": "",
    }


def _group_of(path: Path, model: openvino.Model) -> int:
    """The size of the groups in which activations are quantized, as the IR says it. Raises ArtifactError for another one."""
    size = model.get_rt_info(list(GROUP_SIZE)).astype(str) if model.has_rt_info(list(GROUP_SIZE)) else "0"
    if size not in ("0", str(GROUP)):
        raise ArtifactError(f"'{path}' quantizes activations in groups of {size:.20}, not {GROUP}; compile the model again")
    return int(size)


def _precision(program: Program) -> str:
    """The precision of products and other operators: bf16 for a program that computes in bfloat16, else f32."""
    types = (nodes.tensor_type(node) for node in program.nodes() if nodes.is_tensor(node))
    return "bf16" if any(type.dtype == torch.bfloat16 for type in types) else "f32"


def _check_interface(program: Program, path: Path, model: openvino.Model) -> None:
    """Refuse a model whose inputs or outputs are not the program's, by which tensors are passed. Raises ArtifactError."""
    leaves = program.signature.tensors
    wanted_inputs = [(name, leaf.type.dtype, leaf.type.rank) for name, leaf in zip(input_names(program), leaves, strict=True)]
    types = [nodes.tensor_type(result) for result in results_of(program)]
    wanted_outputs = [(name, type.dtype, type.rank) for name, type in zip(output_names(program), types, strict=True)]
    past, present = state_names(program)
    states = [program.weight(name) for name in program.state]
    wanted_inputs += [(name, state.dtype, state.dim()) for name, state in zip(past, states, strict=True)]
    wanted_outputs += [(name, state.dtype, state.dim()) for name, state in zip(present, states, strict=True)]
    # Said of indices, after the program's own.
    outputs = model.outputs[:-1] if _says_outside(model) else model.outputs
    for kind, ports, wanted in (("input", model.inputs, wanted_inputs), ("output", outputs, wanted_outputs)):
        if len(ports) != len(wanted):
            raise ArtifactError(f"'{path}' has {len(ports)} {kind}s, and the program {len(wanted)}; compile the model again")
        for port, (name, dtype, rank) in zip(ports, wanted, strict=True):
            shape = port.get_partial_shape()
            same = shape.rank.is_dynamic or shape.rank.get_length() == rank
            if name not in port.get_names() or port.get_element_type() != TYPES.get(dtype) or not same:
                given = f"{', '.join(sorted(port.get_names()))}: {port.get_element_type().get_type_name()}{shape}"
                raise ArtifactError(
                    f"'{path}' has the {kind} {given}, and the program {name}: {dtype} of {rank} dimensions; "
                    f"compile the model again"
                )


def _check_states(program: Program, path: Path, model: openvino.Model) -> None:
    """Refuse a model whose states have other shapes than the memory that it reads and writes. Raises ArtifactError."""
    for name, ports in zip(program.state, _state_ports(program, model), strict=True):
        shape = list(program.weight(name).shape)
        for port in ports:
            given = port.get_partial_shape()
            if given.is_dynamic or [*given.to_shape()] != shape:
                raise ArtifactError(f"'{path}' keeps '{name}' as {given}, and the program as {shape}; compile the model again")


def _state_ports(program: Program, model: openvino.Model) -> list[tuple[openvino.Output, openvino.Output]]:
    """The input and the output of each state, which follow those of the program."""
    first, last = len(program.signature.tensors), len(results_of(program))
    return [*zip(model.inputs[first:], model.outputs[last : last + len(program.state)], strict=True)]


def _says_outside(model: openvino.Model | openvino.CompiledModel) -> bool:
    """True if the last output says whether an index was out of range."""
    return bool(model.outputs) and OUTSIDE in model.outputs[-1].get_names()


def shared(tensor: torch.Tensor) -> openvino.Tensor:
    """The tensor's memory as a tensor of OpenVINO; numpy has no bfloat16."""
    if tensor.dtype is torch.bfloat16:
        return openvino.Tensor(tensor.view(torch.int16).numpy(), openvino.Shape(list(tensor.shape)), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


def _copied(tensor: openvino.Tensor, dtype: torch.dtype) -> torch.Tensor:
    data: Any = tensor.data
    if dtype is torch.bfloat16:
        return torch.from_numpy(data.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(data.copy())


def reason_of(error: BaseException) -> str:
    """The class of an error, and the first line of its message that says more than a place in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from ", "Check '", "FrontEnd API failed"))]
    return f"{type(error).__name__}: {told[0]}" if told else kind_and_reason(error)
