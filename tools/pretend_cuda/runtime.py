"""`torch.cuda` with a device, while a block runs: streams, events, graphs, properties, and tensors made on it."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo

from lissom.artifacts import weights
from lissom.compiler.ir import signature
from lissom.frontends.dynamo import graphs
from lissom.ops.native.build import cache_folder, find_compiler
from lissom.runtime import tracers
from tools.pretend_cuda.recording import Recording, record, recording, set_sync_debug_mode, waiting_is_refused
from tools.pretend_cuda.tensor import DEVICE, PretendTensor, run

aten = torch.ops.aten
NAME = "Pretended GPU"
_GUARD = Path(__file__).with_name("guard.cpp")


@contextmanager
def pretend_cuda(capability: tuple[int, int] = (8, 0)) -> Generator[torch.device]:
    """Pretend that there is one GPU until the block ends; gives its device.

    Args:
        capability: the compute capability that it reports.

    Raises:
        RuntimeError: where a GPU is present, or the C++ compiler that the device guard needs is not.
    """
    if torch.cuda.is_available():
        raise RuntimeError(f"a GPU cannot be pretended beside {torch.cuda.get_device_name(0)}")
    if torch.version.cuda is None:
        _register_guard()
    # It lists the functions of torch.cuda, and refuses one that stands there twice.
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    with ExitStack() as stack:
        library = torch.library.Library("_", "IMPL")
        stack.callback(library._destroy)
        library.fallback(_made, "CUDA")
        makers = torch.library.Library("aten", "IMPL")
        stack.callback(makers._destroy)
        for maker in _MAKERS:
            makers.impl(maker, partial(_made, maker), "CUDA")
        for name, value in _functions(capability).items():
            stack.enter_context(patch.object(torch.cuda, name, value, create=True))
        # `module.to` would put a subclass's data into a plain parameter, which then is no subclass.
        stack.callback(
            torch.__future__.set_swap_module_params_on_conversion, torch.__future__.get_swap_module_params_on_conversion()
        )
        torch.__future__.set_swap_module_params_on_conversion(True)
        for name in ("tensor", "as_tensor"):
            stack.enter_context(patch.object(torch, name, partial(_from_data, getattr(torch, name))))
        stack.enter_context(patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor.to(DEVICE)))
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", lambda tensor, *_, **__: tensor))
        stack.enter_context(patch.object(tracers, "_address", lambda tensor: tensor.data_ptr()))
        for module, name in ((signature, "_PLAIN"), (graphs, "_PLAIN"), (weights, "_KINDS")):
            # Other subclasses that run operators themselves are refused.
            stack.enter_context(patch.object(module, name, (*getattr(module, name), PretendTensor)))
        stack.enter_context(patch.object(torch.version, "cuda", torch.version.cuda or "13.0"))
        yield DEVICE


def _register_guard() -> None:
    """Load a device guard for CUDA into this process, once; it is built once for each version of PyTorch."""
    global _REGISTERED
    if _REGISTERED:
        return
    kept = hashlib.sha256(f"{torch.__version__}{_GUARD.read_text(encoding='utf-8')}".encode()).hexdigest()[:20]
    library = cache_folder() / f"pretended-cuda-{kept}.so"
    if not library.exists():
        from torch.utils.cpp_extension import include_paths, library_paths

        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            paths = [*(f"-isystem{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths())]
            flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w"]
            subprocess.run([*find_compiler(), *flags, str(_GUARD), *paths, "-lc10", "-o", str(made)], check=True)
            made.replace(library)
    torch.ops.load_library(str(library))
    _REGISTERED = True


_REGISTERED = False
_MAKERS = (
    *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default, aten.range.step),
    *(aten.eye.default, aten.eye.m, aten.randperm.default, aten.randperm.generator),
)
"""Operators that are written as an empty tensor which another operator then gives its size."""


def _made(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> object:
    """An operator that makes a tensor on the device."""
    return run(op, args, kwargs)


def _from_data(make: Callable[..., torch.Tensor], data: object, *, device: Any = None, **options: Any) -> torch.Tensor:
    """`torch.tensor` copies to the device past everything that could see it, so the copy is made after it."""
    if device is None or torch.device(device).type != "cuda":
        return make(data, device=device, **options)
    return make(data, **options).to(device)


class Stream:
    """A stream; everything runs at once, in order."""

    cuda_stream = 0
    device = DEVICE

    def __init__(self, *_: object, **__: object) -> None:
        """Of any priority."""

    def wait_stream(self, stream: Stream) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Event) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        """An event that has come."""
        return event or Event()

    def synchronize(self) -> None:
        """Raises while a graph records."""
        _require_no_recording("cudaStreamSynchronize")

    def query(self) -> bool:
        """All work is done."""
        return True


class Event:
    """An event that has always come."""

    def __init__(self, *_: object, **__: object) -> None:
        """With any options."""

    def record(self, stream: Stream | None = None) -> None:
        """Nothing to wait for."""

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Raises while a graph records."""
        _require_no_recording("cudaEventSynchronize")

    def query(self) -> bool:
        """It has come."""
        return True

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds: nothing is timed here."""
        return 1.0


class CUDAGraph:
    """A graph that runs its operators again, one by one."""

    def __init__(self, *_: object, **__: object) -> None:
        self.recorded: Recording | None = None

    def replay(self) -> None:
        """Run what was recorded. Raises RuntimeError where nothing was."""
        if self.recorded is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self.recorded.replay()

    def pool(self) -> tuple[int, int]:
        """The memory pool: there is one."""
        return (0, 0)

    def reset(self) -> None:
        """Forget what was recorded."""
        self.recorded = None


@contextmanager
def _graph(graph: CUDAGraph, *_: object, **__: object) -> Generator[None]:
    """Record what this thread runs in the block."""
    _require_no_recording("cudaStreamBeginCapture")
    recorded = Recording()
    record(recorded)
    try:
        yield
    finally:
        record(None)
    recorded.spoil()
    graph.recorded = recorded


def _require_no_recording(call: str) -> None:
    if recording() is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({call})")


def _functions(capability: tuple[int, int]) -> dict[str, Any]:
    """What replaces functions and classes of torch.cuda."""
    stream = Stream()
    memory = 80 << 30
    properties = SimpleNamespace(
        name=NAME,
        major=capability[0],
        minor=capability[1],
        total_memory=memory,
        multi_processor_count=108,
        L2_cache_size=40 << 20,
        shared_memory_per_block_optin=166912,
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
    )
    nothing = lambda *_, **__: None  # noqa: E731
    zero = lambda *_, **__: 0  # noqa: E731
    return {
        "is_available": lambda: True,
        "_lazy_init": nothing,
        "init": nothing,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "device": lambda *_: nullcontext(),
        "stream": lambda *_: nullcontext(),
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: capability,
        "get_device_properties": lambda *_: properties,
        "get_arch_list": lambda: [f"sm_{capability[0]}{capability[1]}"],
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: _require_no_recording("cudaDeviceSynchronize"),
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": _graph,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: recording() is not None,
        "set_sync_debug_mode": set_sync_debug_mode,
        "get_sync_debug_mode": lambda: 2 * waiting_is_refused(),
        "empty_cache": nothing,
        "mem_get_info": lambda *_: (memory, memory),
        "memory_allocated": zero,
        "max_memory_allocated": zero,
        "memory_reserved": zero,
        "reset_peak_memory_stats": nothing,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "manual_seed": torch.manual_seed,
        "manual_seed_all": nothing,
    }


__all__ = ["NAME", "PretendTensor", "pretend_cuda"]
