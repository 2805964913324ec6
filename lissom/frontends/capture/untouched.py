"""Protection of the caller's model: capture restores what a forward changed, and programs only read its weights.

`torch.export` runs a model's own Python code with fake tensors. A forward that caches a tensor in an attribute, such as a table
of frequencies, leaves a fake tensor in the model, and the model's next outputs are wrong.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import is_

import torch
from torch import nn

from lissom.errors import CaptureError
from lissom.frontends.checkpoints.stored_weights import keep_stored, stored_form

_Container = dict[object, object] | list[object] | set[object]
_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def untouched(model: nn.Module) -> Generator[None]:
    """Restore every attribute, parameter, buffer, submodule and training mode of a model and its submodules.

    Attributes are compared by identity; the items of lists, dictionaries and sets among them are restored too.

    Raises:
        CaptureError: if a tensor that is not a buffer was written in place, which cannot be undone.
    """
    snapshots = [_Snapshot.of(path, module) for path, module in model.named_modules()]
    buffers = [(buffer, _version(buffer), buffer.detach().clone()) for buffer in model.buffers()]
    versions = [(path, tensor, _version(tensor)) for snapshot in snapshots for path, tensor in snapshot.tensors()]
    try:
        yield
    finally:
        for snapshot in snapshots:
            snapshot.restore()
        for buffer, version, values in buffers:
            if _version(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(values)
    written = next((path for path, tensor, version in versions if _version(tensor) != version), None)
    if written is not None:
        raise CaptureError(
            f"{type(model).__name__} writes to '{written}' in place, and it holds other values now: load the model again, and "
            f"register what it keeps as a buffer"
        )


@contextmanager
def nothing_registered(model: nn.Module) -> Generator[None]:
    """Refuse a forward that registers buffers, parameters or submodules: export loses buffers, and new weights are random.

    Raises:
        CaptureError: naming the first.
    """
    before = _registered(model)
    try:
        yield
    finally:
        made = next((entry for entry in _registered(model) if entry not in before), None)
        if made is not None:
            kind, path, _ = made
            raise CaptureError(
                f"{type(model).__name__} registers the {kind} '{path}' while it runs; call the model once before, or register "
                f"it in __init__"
            )


@contextmanager
def assignments_as_writes(model: nn.Module) -> Generator[None]:
    """While exporting, write `self.buffer = value` into the buffer: torch.export sees assignments in the root module alone."""
    held = {id(module) for module in model.modules()}

    def write(module: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor | None:
        before = module._buffers.get(name)
        if id(module) not in held or before is None or before is value or not torch.compiler.is_exporting():
            return None
        return before.copy_(value) if before.shape == value.shape and before.dtype == value.dtype else None

    handle = torch.nn.modules.module.register_module_buffer_registration_hook(write)  # pyright: ignore
    try:
        yield
    finally:
        handle.remove()


def _registered(model: nn.Module) -> dict[tuple[str, str, bool], None]:
    """The buffers, parameters and submodules: kind, path, and whether it is in the state dict."""
    registered: dict[tuple[str, str, bool], None] = {}
    for path, module in model.named_modules():
        kinds = {"submodule": module._modules, "parameter": module._parameters, "buffer": module._buffers}
        for kind, held in kinds.items():
            for name in held:
                registered[kind, f"{path}.{name}".removeprefix("."), name not in module._non_persistent_buffers_set] = None
    return registered


@dataclass(frozen=True)
class _Snapshot:
    """The content of a module.

    Attributes:
        path: of the module.
        attributes: its `__dict__`.
        held: the containers among them, each with a copy.
    """

    path: str
    module: nn.Module
    attributes: dict[str, object]
    held: list[tuple[_Container, _Container]]

    @classmethod
    def of(cls, path: str, module: nn.Module) -> _Snapshot:
        attributes = dict(module.__dict__)
        values = [value for value in attributes.values() if isinstance(value, (dict, list, set)) and type(value) in _CONTAINERS]
        held = [(value, value.copy()) for value in values]
        return cls(path, module, attributes, held)

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors a forward must not write, by path: parameters and plain attributes, but not buffers."""
        parameters = {name: value for name, value in self.module._parameters.items() if value is not None}
        tensors = {**parameters, **{name: value for name, value in self.attributes.items() if isinstance(value, torch.Tensor)}}
        return [(f"{self.path}.{name}".removeprefix("."), tensor) for name, tensor in tensors.items()]

    def restore(self) -> None:
        """Restore the module; unchanged attributes are not written, because another thread may be running the model."""
        now = self.module.__dict__
        for name in now.keys() - self.attributes.keys():
            del now[name]
        for name, value in self.attributes.items():
            if now.get(name, now) is not value:
                now[name] = value
        for container, before in self.held:
            _refill(container, before)


def _refill(container: _Container, before: _Container) -> None:
    """Restore the items of a container."""
    if len(container) == len(before) and all(map(is_, _objects(container), _objects(before))):
        return
    container.clear()
    if isinstance(container, list):
        container.extend(before)
    else:
        container.update(before)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _objects(container: _Container) -> Iterator[object]:
    """The items of a container in order; for a dictionary its keys and values."""
    return chain(container, container.values()) if isinstance(container, dict) else iter(container)


def _version(tensor: torch.Tensor) -> int:
    """PyTorch's count of in-place writes to a tensor; 0 for inference tensors, which have no counter."""
    return 0 if tensor.is_inference() else tensor._version


def alias(weight: torch.Tensor) -> torch.Tensor:
    """A tensor that shares a weight's memory and requires no gradient, for a program to read.

    It is a parameter if the weight is a trainable one: `Program.own_copy` copies these, and makes them require gradients. It
    remembers in what form a file stores the weight.
    """
    plain = ordinary(weight.detach())
    trained = isinstance(weight, nn.Parameter) and weight.requires_grad
    return keep_stored(nn.Parameter(plain, requires_grad=False) if trained else plain, stored_form(weight))


def ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; for an inference tensor, a normal one that shares its memory, so that autograd accepts it."""
    if not tensor.is_inference():
        return tensor
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return ordinary(tensor)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return tensor.clone()
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
