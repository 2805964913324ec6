"""Isolation of captures: one at a time, on a copy of the modules, with random generators restored.

While `torch.export` traces a module, it replaces the module's weights by fake tensors, and its own state is global. Other
threads may call the caller's module meanwhile, in any mode.
"""

from __future__ import annotations

import copy
import importlib
import logging
import random
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import fx, nn

Model = TypeVar("Model", bound=nn.Module)
_MISSING = object()
_LOGGERS = ("torch.export._trace", "torch.fx.experimental.symbolic_shapes")


@contextmanager
def isolated(device: torch.device) -> Generator[None]:
    """Exclude captures and compilations of other threads, and restore the random generators when the block ends.

    A model may draw numbers in evaluation mode too; the generators of PyTorch, on the CPU and `device`, of NumPy and of Python
    are restored. Comparing outputs while another thread captures would run under its tracing. The lock is Dynamo's own: export
    enters Dynamo for some operators and Dynamo calls this backend, so two locks could deadlock. The lock is reentrant.
    """
    from torch._dynamo.convert_frame import compile_lock

    with compile_lock, torch.random.fork_rng([device] if device.type == "cuda" else []):
        python, array = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


def with_own_modules(model: Model) -> Model:
    """A copy of the model's modules in evaluation mode, with the same parameters and buffers.

    Returns the model itself if it cannot be copied: an object in it refuses, or an instance has its own `forward`, which may
    refer to the original module. A graph module is not copied, because a copy loses its class name.
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
    # Attributes such as locks, files and sessions of other libraries may raise any error when copied.
    except Exception:
        return model
    if any(_reads_original(vars(module), tensors, set()) for module in copied.modules()):
        return model
    for module in copied.modules():
        module.training = False
    return copied


def _reads_original(value: object, copies: Mapping[int, object], seen: set[int]) -> bool:
    """True for a function, or a container of one, that holds an object of the original: functions are not copied.

    A hook with `def hook(*_): self.kept = ...` in `__init__` writes to the original model, and the copy never sees it.

    Args:
        copies: the copied objects by the `id` of the original.
    """
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, FunctionType):
        held = [*_cells(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values()]
        return any(copies.get(id(part), part) is not part or _reads_original(part, copies, seen) for part in held)
    if isinstance(value, (MethodType, partial)):
        return _reads_original(value.__func__ if isinstance(value, MethodType) else value.func, copies, seen)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    return any(_reads_original(part, copies, seen) for part in parts)


def _cells(function: FunctionType) -> list[object]:
    """The objects in a function's closure; a cell is empty before its variable is assigned."""
    contents = list[object]()
    for cell in function.__closure__ or ():
        with suppress(ValueError):
            contents.append(cell.cell_contents)
    return contents


@contextmanager
def exchanged(owner: object, name: str, value: object) -> Generator[None]:
    """Replace another library's attribute, for all threads, until the block ends; remove it if there was none."""
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
def translations_kept() -> Generator[None]:
    """Let torch's ONNX exporter read its translations once: it parses the sources of 500 functions for every model."""
    known = _translations()
    with exchanged(_exporter(), "get_torchlib_ops", lambda: known):
        yield


def _exporter() -> Any:
    return importlib.import_module("torch.onnx._internal._lazy_import").onnxscript_apis


@cache
def _translations() -> Any:
    return _exporter().get_torchlib_ops()


@contextmanager
def without_export_messages() -> Generator[None]:
    """Silence torch.export's messages in this thread: the CaptureError has their content in one sentence."""
    thread = threading.get_ident()

    def other_threads(record: logging.LogRecord) -> bool:
        return record.thread != thread

    def print_elsewhere(*values: object, **options: Any) -> None:
        if threading.get_ident() != thread:
            print(*values, **options)

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(other_threads)
    try:
        with exchanged(importlib.import_module("torch.export._trace"), "print", print_elsewhere):
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(other_threads)


@contextmanager
def only_errors(*names: str) -> Generator[None]:
    """Raise the level of these loggers to ERROR until the block ends."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
