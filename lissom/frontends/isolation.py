"""What keeps capture to itself: one capture at a time, on a copy of the modules, with random numbers put back.

While `torch.export` traces a module it exchanges the module's weights for fake tensors, and its own state is global. Other
threads may call the caller's module meanwhile, in whatever mode it is.
"""

from __future__ import annotations

import copy
import importlib
import logging
import random
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FunctionType

import numpy as np
import torch
from torch import fx, nn

_MISSING = object()
_LOGGERS = ("torch.export._trace", "torch.fx.experimental.symbolic_shapes")


@contextmanager
def isolated(device: torch.device) -> Generator[None]:
    """Wait for the captures and compilations of other threads to end and keep theirs waiting, and draw no random numbers.

    A model may draw numbers in evaluation mode too; the generators of PyTorch, on the CPU and `device`, of NumPy and of Python
    are put back. What is checked while another thread captures would meet its tracing. The lock is Dynamo's own: export enters
    Dynamo for some operators and Dynamo calls this backend, so two locks could be taken in either order. A thread that holds it
    may capture again.
    """
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock, torch.random.fork_rng([device] if device.type == "cuda" else []):
        python, array = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


def with_own_modules(model: nn.Module) -> nn.Module:
    """The model's modules copied, in evaluation mode, around the same parameters and buffers.

    The model itself where it cannot be copied: where an object in it refuses, or a `forward` that was put into an instance may
    have hold of the module. A graph is not copied, because a copy loses the name of its class.
    """
    if isinstance(model, fx.GraphModule) or any(
        isinstance(vars(module).get("forward"), FunctionType) for module in model.modules()
    ):
        return model
    tensors: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        tensors |= {id(value): value for value in vars(module).values() if isinstance(value, torch.Tensor)}
    try:
        copied = copy.deepcopy(model, tensors)
    # What a model holds may refuse to be copied with any error: locks, files, sessions of other libraries.
    except Exception:
        return model
    for module in copied.modules():
        module.training = False
    return copied


@contextmanager
def exchanged(owner: object, name: str, value: object) -> Generator[None]:
    """Another library's attribute exchanged for all threads, and put back; removed again where there was none."""
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def without_export_messages() -> Generator[None]:
    """Keep torch.export from writing to standard error, in this thread, what a CaptureError says in one sentence."""
    thread = threading.get_ident()

    def other_threads(record: logging.LogRecord) -> bool:
        return record.thread != thread

    def print_elsewhere(*values: object, **options: object) -> None:
        if threading.get_ident() != thread:
            print(*values, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(other_threads)
    try:
        with exchanged(importlib.import_module("torch.export._trace"), "print", print_elsewhere):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(other_threads)
